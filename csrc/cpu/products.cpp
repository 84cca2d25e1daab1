// gradient_products on the CPU.
#include "../operators/gradient_products.h"

#include "../math/reduce.h"
#include "../operators/dispatch.h"

#include "strips.h"

namespace unlearn {
namespace {

// Explicit lanes: a plain sum is a chain of dependent additions that the compiler may not reorder.
struct LaneSums {
  double forget_square[kWordBits] = {}, retain_square[kWordBits] = {}, cross[kWordBits] = {};
  std::int32_t non_finite[kWordBits] = {};

  Products total() const {
    Products sum[kWordBits];
    for (int i = 0; i < kWordBits; ++i) {
      sum[i] = {forget_square[i], retain_square[i], cross[i], double(non_finite[i])};
    }
    combine_in_fixed_order(sum, kWordBits);
    return sum[0];
  }
};

template <bool forget, bool retain, typename T>
inline __attribute__((always_inline)) void add_word(
    LaneSums& sums, const T* __restrict g_forget, const T* __restrict g_retain, std::uint32_t keep_forget,
    std::uint32_t keep_retain) {
  for (int i = 0; i < kWordBits; ++i) {
    add_products<forget, retain>(
        forget ? g_forget[i] : T(0), retain ? g_retain[i] : T(0), lane_mask<T>(keep_forget, i),
        lane_mask<T>(keep_retain, i), sums.forget_square[i], sums.retain_square[i], sums.cross[i], sums.non_finite[i]);
  }
}

template <bool forget, bool retain, typename T>
void add_strip(
    LaneSums& sums, const RawList& forget_list, const RawList& retain_list, const RawList& bits, bool mask_retain,
    size_t t, std::int64_t start, int n) {
  T forget_buffer[kStrip], retain_buffer[kStrip];
  const T* f = forget ? load_strip(forget_list, t, start, n, forget_buffer) : nullptr;
  const T* r = retain ? load_strip(retain_list, t, start, n, retain_buffer) : nullptr;
  for (int offset = 0; offset < n; offset += kWordBits) {
    const std::uint32_t word = word_at(bits, t, (start + offset) / kWordBits);
    const std::uint32_t keep_retain = mask_retain ? word : ~0u;
    const int lanes = n - offset;
    const T* f_word = forget ? f + offset : nullptr;
    const T* r_word = retain ? r + offset : nullptr;
    PaddedWord<T> f_padded, r_padded;
    if (lanes < kWordBits) {
      if (forget) f_word = f_padded.fill(f_word, lanes);
      if (retain) r_word = r_padded.fill(r_word, lanes);
    }
    add_word<forget, retain, T>(sums, f_word, r_word, word, keep_retain);
  }
}

template <bool forget, bool retain>
Products sum_of(const RawList& f, const RawList& r, const RawList& bits, bool mask_retain, const WorkRange& work) {
  std::vector<Products> partials(size_t(std::max<std::int64_t>(work.blocks(), 1)));
  for_each_block(work, [&](std::int64_t block) {
    LaneSums sums;
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      const bool f64 = (forget && f.dtype[t] == ScalarType::Double) || (retain && r.dtype[t] == ScalarType::Double);
      for_each_strip(begin, count, [&](std::int64_t start, int n) {
        if (f64) {
          add_strip<forget, retain, double>(sums, f, r, bits, mask_retain, t, start, n);
        } else {
          add_strip<forget, retain, float>(sums, f, r, bits, mask_retain, t, start, n);
        }
      });
    });
    partials[size_t(block)] = sums.total();
  });
  combine_in_fixed_order(partials.data(), std::int64_t(partials.size()));
  return partials[0];
}

void sum_products(
    const TensorList& forget_grads, const TensorList& retain_grads, const TensorList& bits, bool mask_retain,
    const Tensor& result) {
  const bool forget = !forget_grads.empty(), retain = !retain_grads.empty();
  const RawList f(forget_grads), r(retain_grads), b(bits);
  const WorkRange work(sizes_of(forget ? forget_grads : retain_grads));
  const Products sum = with_gradients(forget, retain, [&](auto forget, auto retain) {
    return sum_of<forget.value, retain.value>(f, r, b, mask_retain, work);
  });
  double* out = static_cast<double*>(result.data_ptr());
  out[0] = sum.forget_square;
  out[1] = sum.retain_square;
  out[2] = sum.cross;
  out[3] = sum.non_finite;
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("gradient_products", TORCH_BOX(&unlearn::gradient_products<&unlearn::sum_products>));
}
