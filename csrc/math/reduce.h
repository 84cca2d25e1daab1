// Deterministic sums: fixed lanes inside a block, fixed blocks inside a list, one fixed order of combination.
// The cut into blocks depends on the list alone, never on threads, so every run gives the same bits.
#pragma once

#include <cstdint>

#include "bits.h"

namespace unlearn {

// What gradient_products sums. The products are exact in double for float gradients.
struct Products {
  double forget_square = 0, retain_square = 0, cross = 0, non_finite = 0;

  UNLEARN_INLINE void add(const Products& other) {
    forget_square += other.forget_square;
    retain_square += other.retain_square;
    cross += other.cross;
    non_finite += other.non_finite;
  }
};

// Adds one pair of gradients to a lane's sums. keep_*: all ones where the entry counts; what does not is deselected,
// so that an inf or a NaN there leaves no trace. A list that is absent passes zeros.
template <bool forget, bool retain, typename T, typename Count>
UNLEARN_INLINE void add_products(
    T g_forget, T g_retain, bits_t<T> keep_forget, bits_t<T> keep_retain, double& forget_square, double& retain_square,
    double& cross, Count& non_finite) {
  const T f = forget ? keep_or_zero(keep_forget, g_forget) : T(0);
  const T r = retain ? keep_or_zero(keep_retain, g_retain) : T(0);
  if constexpr (forget) forget_square += double(f) * double(f);
  if constexpr (retain) retain_square += double(r) * double(r);
  if constexpr (forget && retain) cross += double(f) * double(r);
  non_finite += Count((forget ? is_non_finite(f) : false) + (retain ? is_non_finite(r) : false));
}

// Combines partials[0 .. count) by a balanced tree into partials[0]; the error grows with log(count).
template <typename Partial>
UNLEARN_INLINE void combine_in_fixed_order(Partial* partials, std::int64_t count) {
  for (std::int64_t stride = 1; stride < count; stride *= 2) {
    for (std::int64_t i = 0; i + stride < count; i += 2 * stride) {
      partials[i].add(partials[i + stride]);
    }
  }
}

} // namespace unlearn
