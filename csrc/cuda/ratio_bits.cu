// ratio_bits on CUDA: a thread's octet is one byte of the mask.
#include "../operators/ratio_bits.h"

#include "../math/saliency.h"

#include "launch.cuh"
#include "octet.cuh"

namespace unlearn {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) ratio_kernel(
    const __grid_constant__ Table table, const __grid_constant__ RatioOptions options, unsigned long long* counts) {
  __shared__ unsigned int kept;
  if (threadIdx.x == 0) kept = 0;
  __syncthreads();
  const int t = table.tensor_of(blockIdx.x);
  const Storage forget_storage = table.storage(0, t), retain_storage = table.storage(1, t);
  const T forget_scale = T(options.forget_scale), retain_scale = T(options.retain_scale);
  const T eps = T(options.eps), gamma = T(options.gamma);
  unsigned int thread_kept = 0;
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    Octet<T> stored_forget, stored_retain;
    load_octet(stored_forget, forget_storage, table.pointer(0, t), i, n);
    load_octet(stored_retain, retain_storage, table.pointer(1, t), i, n);
    T forget[kOctet], retain[kOctet];
    widen(stored_forget, forget_storage, forget);
    widen(stored_retain, retain_storage, retain);
    std::uint32_t byte = 0;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      byte |= std::uint32_t(is_salient(forget[k], retain[k], forget_scale, retain_scale, eps, gamma)) << k;
    }
    byte &= valid_bits(n);
    store_mask(table.pointer(2, t), i, table.size(t), byte);
    thread_kept += unsigned(count_word(byte));
  });
  atomicAdd(&kept, thread_kept);
  __syncthreads();
  // Integers: any order gives the same sum.
  if (threadIdx.x == 0) atomicAdd(counts + table.index(t), static_cast<unsigned long long>(kept));
}

void write_ratio_bits(
    const TensorList& forget_fisher, const TensorList& retain_fisher, const RatioOptions& options,
    const TensorList& bits, const Tensor& counts) {
  const OnDevice device(forget_fisher[0]);
  device.zero("ratio_bits", counts);
  auto* kept = static_cast<unsigned long long*>(counts.data_ptr());
  const RawList f(forget_fisher), r(retain_fisher), b(bits);
  Columns columns;
  columns.add(f, /*mixed=*/true);
  columns.add(r, /*mixed=*/true);
  columns.add(b);
  const auto is_f64 = [&](size_t t) { return f.dtype[t] == ScalarType::Double || r.dtype[t] == ScalarType::Double; };
  const auto sizes = sizes_of(forget_fisher);
  for (const bool f64 : {false, true}) {
    columns.for_each_table(
        sizes, chunks_of, [&](size_t t) { return is_f64(t) == f64; },
        [&](const Table& table) {
          const auto kernel = f64 ? ratio_kernel<double> : ratio_kernel<float>;
          device.launch("ratio_bits", kernel, table.units, table, options, kept);
        });
  }
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("ratio_bits", TORCH_BOX(&unlearn::ratio_bits<&unlearn::write_ratio_bits>));
}
