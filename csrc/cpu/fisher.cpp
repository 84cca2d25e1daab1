// accumulate_fisher_ on the CPU.
#include "../operators/accumulate_fisher.h"

#include "../math/saliency.h"

#include "strips.h"

namespace unlearn {
namespace {

template <typename T>
void accumulate_strip(const RawList& fisher, const RawList& grads, T weight, size_t t, std::int64_t start, int n) {
  T buffer[kStrip];
  const T* __restrict g = load_strip(grads, t, start, n, buffer);
  T* __restrict f = fisher.at<T>(t, start);
  UNLEARN_LANES
  for (int i = 0; i < n; ++i) f[i] = accumulate_fisher(f[i], g[i], weight);
}

void accumulate(const TensorList& fisher, const TensorList& grads, double weight) {
  const RawList f(fisher), g(grads);
  const WorkRange work(sizes_of(fisher));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      for_each_strip(begin, count, [&](std::int64_t start, int n) {
        if (f.dtype[t] == ScalarType::Double) {
          accumulate_strip<double>(f, g, weight, t, start, n);
        } else {
          accumulate_strip<float>(f, g, float(weight), t, start, n);
        }
      });
    });
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("accumulate_fisher_", TORCH_BOX(&unlearn::accumulate_fisher_<&unlearn::accumulate>));
}
