// ratio_bits on the CPU.
#include "../operators/ratio_bits.h"

#include "../math/saliency.h"

#include "strips.h"

namespace unlearn {
namespace {

template <typename T>
inline __attribute__((always_inline)) std::uint32_t ratio_word(
    const T* __restrict forget, const T* __restrict retain, T forget_scale, T retain_scale, T eps, T gamma) {
  std::uint32_t word = 0;
  for (int i = 0; i < kWordBits; ++i) {
    word |= std::uint32_t(is_salient(forget[i], retain[i], forget_scale, retain_scale, eps, gamma)) << i;
  }
  return word;
}

template <typename T>
std::int64_t ratio_strip(
    const RawList& forget, const RawList& retain, const RawList& bits, const RatioOptions& o, size_t t,
    std::int64_t start, int n) {
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

void write_ratio_bits(
    const TensorList& forget_fisher, const TensorList& retain_fisher, const RatioOptions& options,
    const TensorList& bits, const Tensor& counts) {
  std::int64_t* kept = static_cast<std::int64_t*>(counts.data_ptr());
  std::fill(kept, kept + forget_fisher.size(), 0);
  const RawList f(forget_fisher), r(retain_fisher), b(bits);
  const WorkRange work(sizes_of(forget_fisher));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      const bool f64 = f.dtype[t] == ScalarType::Double || r.dtype[t] == ScalarType::Double;
      std::int64_t sum = 0;
      for_each_strip(begin, count, [&](std::int64_t start, int n) {
        sum += f64 ? ratio_strip<double>(f, r, b, options, t, start, n)
                   : ratio_strip<float>(f, r, b, options, t, start, n);
      });
      __atomic_fetch_add(kept + t, sum, __ATOMIC_RELAXED); // integers: any order gives the same sum
    });
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("ratio_bits", TORCH_BOX(&unlearn::ratio_bits<&unlearn::write_ratio_bits>));
}
