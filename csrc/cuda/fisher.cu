// accumulate_fisher_ on CUDA.
#include "../operators/accumulate_fisher.h"

#include "../math/saliency.h"

#include "launch.cuh"
#include "octet.cuh"

namespace unlearn {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) fisher_kernel(const __grid_constant__ Table table, T weight) {
  constexpr Storage state_storage = sizeof(T) == 8 ? Storage::f64 : Storage::f32;
  const int t = table.tensor_of(blockIdx.x);
  const Storage grads_storage = table.storage(0, t);
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    Octet<T> stored, stored_grads;
    load_octet(stored, state_storage, table.pointer(0, t), i, n);
    load_octet(stored_grads, grads_storage, table.pointer(1, t), i, n);
    T fisher[kOctet], grads[kOctet];
    widen(stored, state_storage, fisher);
    widen(stored_grads, grads_storage, grads);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) fisher[k] = accumulate_fisher(fisher[k], grads[k], weight);
    store_octet(table.pointer(0, t), i, n, fisher);
  });
}

void accumulate(const TensorList& fisher, const TensorList& grads, double weight) {
  const OnDevice device(fisher[0]);
  const RawList f(fisher), g(grads);
  Columns columns;
  columns.add(f);
  columns.add(g, /*mixed=*/true);
  const auto sizes = sizes_of(fisher);
  for (const bool f64 : {false, true}) {
    columns.for_each_table(
        sizes, chunks_of, [&](size_t t) { return (f.dtype[t] == ScalarType::Double) == f64; },
        [&](const Table& table) {
          if (f64) {
            device.launch("accumulate_fisher_", fisher_kernel<double>, table.units, table, weight);
          } else {
            device.launch("accumulate_fisher_", fisher_kernel<float>, table.units, table, float(weight));
          }
        });
  }
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("accumulate_fisher_", TORCH_BOX(&unlearn::accumulate_fisher_<&unlearn::accumulate>));
}
