// Runs grids on fibers, and answers what the kernels' launcher asks of PyTorch about CUDA.
#undef _FORTIFY_SOURCE // refuses jumps to other stacks
#include "cuda_runtime.h"

#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The linker names the bounds of what `__shared__` variables are put in.
extern char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

namespace cuda_on_host {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

// A place on a stack to go on from. swapcontext asks the kernel for the signal mask each time, which here takes longer
// than most threads run; jumps do not ask, but the address sanitizer takes them for the end of what they leave.
struct Place {
  ucontext_t context;
#if !defined(__SANITIZE_ADDRESS__)
  jmp_buf jump;
#endif
  bool reached = true;
};

void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.jump) != 0) return;
  if (to.reached) _longjmp(to.jump, 1);
  to.reached = true;
  setcontext(&to.context);
#endif
}

struct Fiber {
  Place place;
  std::vector<char> stack;    // empty until it is first used
  void* fake_stack = nullptr; // the address sanitizer's
  bool finished = false;
};

Place scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_bottom = nullptr;
std::size_t scheduler_bytes = 0;
std::vector<Fiber> fibers;
unsigned current = 0;
const std::function<void()>* body = nullptr;
long launches = 0;

void start_switch(
    [[maybe_unused]] void** save, [[maybe_unused]] const void* bottom, [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}

void finish_switch(
    [[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom, [[maybe_unused]] std::size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#endif
}

void to_scheduler() {
  Fiber& fiber = fibers[current];
  start_switch(&fiber.fake_stack, scheduler_bottom, scheduler_bytes);
  go(fiber.place, scheduler);
  finish_switch(fiber.fake_stack, &scheduler_bottom, &scheduler_bytes);
}

void enter() {
  finish_switch(nullptr, &scheduler_bottom, &scheduler_bytes);
  for (;;) { // one thread of a block after another
    (*body)();
    fibers[current].finished = true;
    to_scheduler();
  }
}

void start(Fiber& fiber) {
  fiber.stack.resize(kStackBytes);
  getcontext(&fiber.place.context);
  fiber.place.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.place.context.uc_stack.ss_size = fiber.stack.size();
  fiber.place.context.uc_link = nullptr;
  fiber.place.reached = false;
  makecontext(&fiber.place.context, enter, 0);
}

} // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  ++launches;
  body = &thread;
  gridDim = grid;
  blockDim = block;
  if (fibers.size() < block.x) fibers = std::vector<Fiber>(block.x);
  for (unsigned b = 0; b < grid.x; ++b) {
    if (__start_shared_memory) std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
    for (unsigned t = 0; t < block.x; ++t) {
      fibers[t].finished = false;
      if (fibers[t].stack.empty()) start(fibers[t]);
    }
    for (unsigned running = block.x; running > 0;) {
      for (unsigned t = 0; t < block.x; ++t) {
        if (fibers[t].finished) continue;
        current = t;
        blockIdx.x = b;
        threadIdx.x = t;
        start_switch(&scheduler_fake_stack, fibers[t].stack.data(), fibers[t].stack.size());
        go(scheduler, fibers[t].place);
        finish_switch(scheduler_fake_stack, nullptr, nullptr);
        running -= fibers[t].finished;
      }
    }
  }
}

} // namespace cuda_on_host

void __syncthreads() {
  cuda_on_host::to_scheduler();
}

extern "C" {

__attribute__((visibility("default"))) long cuda_on_host_launches() {
  return cuda_on_host::launches;
}

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) {
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
