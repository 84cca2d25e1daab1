// ratio_bits: the saliency mask of two Fisher diagonals as packed bits, and how many weights it keeps.
#include "../math/saliency.h"

#include <tuple>

#include "strips.h"

namespace unlearn {
namespace {

struct RatioOptions {
  double gamma, eps, forget_scale, retain_scale;
};

template <typename T>
inline __attribute__((always_inline)) std::uint32_t ratio_word(
    const T* __restrict forget,
    const T* __restrict retain,
    T forget_scale,
    T retain_scale,
    T eps,
    T gamma) {
  std::uint32_t word = 0;
  for (int i = 0; i < kWordBits; ++i) {
    word |= std::uint32_t(is_salient(forget[i], retain[i], forget_scale, retain_scale, eps, gamma)) << i;
  }
  return word;
}

template <typename T>
std::int64_t ratio_strip(
    const RawList& forget,
    const RawList& retain,
    const RawList& bits,
    const RatioOptions& o,
    size_t t,
    std::int64_t start,
    int n) {
  T forget_buffer[kStrip], retain_buffer[kStrip];
  const T* f = load_strip(forget, t, start, n, forget_buffer);
  const T* r = load_strip(retain, t, start, n, retain_buffer);
  std::uint32_t* out = bits.at<std::uint32_t>(t, 0) + start / kWordBits;
  const T sf = T(o.forget_scale), sr = T(o.retain_scale), eps = T(o.eps), gamma = T(o.gamma);
  std::int64_t kept = 0;
  for (int offset = 0; offset < n; offset += kWordBits) {
    const int lanes = n - offset;
    const T *f_word = f + offset, *r_word = r + offset;
    PaddedWord<T> f_padded, r_padded;
    if (lanes < kWordBits) {
      f_word = f_padded.fill(f_word, lanes);
      r_word = r_padded.fill(r_word, lanes);
    }
    const std::uint32_t word = ratio_word(f_word, r_word, sf, sr, eps, gamma) & valid_bits(lanes);
    out[offset / kWordBits] = word;
    kept += count_word(word);
  }
  return kept;
}

std::tuple<TensorList, Tensor> ratio_bits(
    TensorList forget_fisher,
    TensorList retain_fisher,
    double gamma,
    double eps,
    double forget_scale,
    double retain_scale) {
  Operands operands("ratio_bits", "forget_fisher", forget_fisher);
  operands.check_list({"forget_fisher", &forget_fisher}, kStateDtypes);
  operands.check_list({"retain_fisher", &retain_fisher}, kStateDtypes, /*may_be_absent=*/false);
  operands.make_reference_dense(/*written=*/false);
  operands.align(retain_fisher, /*written=*/false);

  TensorList bits;
  bits.reserve(forget_fisher.size());
  for (const Tensor& tensor : forget_fisher) {
    bits.push_back(torch::stable::empty({word_count(tensor.numel())}, ScalarType::Int));
  }
  Tensor counts = torch::stable::empty({std::int64_t(forget_fisher.size())}, ScalarType::Long);
  std::int64_t* kept = counts.mutable_data_ptr<std::int64_t>();
  std::fill(kept, kept + forget_fisher.size(), 0);

  const RatioOptions options{gamma, eps, forget_scale, retain_scale};
  const RawList f(forget_fisher), r(retain_fisher), b(bits);
  const WorkRange work(sizes_of(forget_fisher));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t first, std::int64_t count) {
      const bool wide = f.dtype[t] == ScalarType::Double || r.dtype[t] == ScalarType::Double;
      std::int64_t sum = 0;
      for_each_strip(first, count, [&](std::int64_t start, int n) {
        sum += wide ? ratio_strip<double>(f, r, b, options, t, start, n)
                    : ratio_strip<float>(f, r, b, options, t, start, n);
      });
      __atomic_fetch_add(kept + t, sum, __ATOMIC_RELAXED); // integers: any order gives the same sum
    });
  });
  return {bits, counts};
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("ratio_bits", TORCH_BOX(&unlearn::ratio_bits));
}
