// Stands in for CUDA's header where there is no GPU: the tests compile csrc/cuda for the host with it, unchanged.
//
// A launch runs block by block and thread by thread. Each thread is a fiber, so that __syncthreads can wait for the
// others; the fibers of a block run one at a time, in the order of their numbers. Shared memory is filled with
// poison before every block. What is checked is indexing, alignment, order and arithmetic; not speed, and no race
// between threads that a GPU would run at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct double2 {
  double x, y;
} __attribute__((aligned(16)));

inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}

template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned width = 1) : x(width), y(1), z(1) {}
};
inline dim3 threadIdx(0), blockIdx(0), blockDim(0), gridDim(0);

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

void __syncthreads();

namespace cuda_on_host {
void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);
}

constexpr std::size_t kMostParameterBytes = 32764;

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  static_assert((sizeof(Expected) + ... + 0) + 8 * sizeof...(Expected) <= kMostParameterBytes);
  const auto call = [&] { kernel(Expected(given)...); };
  cuda_on_host::run_grid(config->gridDim, config->blockDim, call);
  return cudaSuccess;
}
