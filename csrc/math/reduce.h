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
