// Saliency of one weight: diagonal Fisher accumulation, the ratio test, and the scores that weights are ranked by.
#pragma once

#include <cmath>

#include "bits.h"

namespace unlearn {

// F += weight * g^2, the diagonal of the empirical Fisher information.
template <typename T>
UNLEARN_INLINE T accumulate_fisher(T fisher, T gradient, T weight) {
  return fisher + weight * (gradient * gradient);
}

// SFR-on's saliency, arXiv 2409.19732: (F_f + eps) / (F_r + eps). The scales turn accumulated sums into means.
template <typename T>
UNLEARN_INLINE T fisher_ratio(T fisher_forget, T fisher_retain, T forget_scale, T retain_scale, T eps) {
  return (fisher_forget * forget_scale + eps) / (fisher_retain * retain_scale + eps);
}

// A NaN ratio is not salient.
template <typename T>
UNLEARN_INLINE bool is_salient(T fisher_forget, T fisher_retain, T forget_scale, T retain_scale, T eps, T gamma) {
  return fisher_ratio(fisher_forget, fisher_retain, forget_scale, retain_scale, eps) >= gamma;
}

// What top_bits ranks weights by; `SCORES` in unlearn_ext/ops/layout.py lists the same names.
enum class Score : int { value = 0, magnitude = 1, product = 2, ratio = 3 };

UNLEARN_INLINE constexpr bool takes_two(Score score) {
  return score == Score::product || score == Score::ratio;
}

// The score of one weight. `other` is theta for a product, F_r for a ratio, and not read otherwise.
template <Score score, typename T>
UNLEARN_INLINE T score_of(T value, T other, T forget_scale, T retain_scale, T eps) {
  if constexpr (score == Score::value) {
    return value;
  } else if constexpr (score == Score::magnitude) {
    return std::fabs(value);
  } else if constexpr (score == Score::product) {
    return std::fabs(value * other);
  } else {
    return fisher_ratio(value, other, forget_scale, retain_scale, eps);
  }
}

} // namespace unlearn
