// Saliency of one weight: diagonal Fisher accumulation and the ratio test.
#pragma once

#include "bits.h"

namespace unlearn {

// F += weight * g^2, the diagonal of the empirical Fisher information.
template <typename T>
UNLEARN_INLINE T accumulate_fisher(T fisher, T gradient, T weight) {
  return fisher + weight * (gradient * gradient);
}

// SFR-on's saliency test, arXiv 2409.19732: (F_f + eps) / (F_r + eps) >= gamma. A NaN ratio is not salient.
// The scales turn accumulated sums into means.
template <typename T>
UNLEARN_INLINE bool is_salient(T fisher_forget, T fisher_retain, T forget_scale, T retain_scale, T eps, T gamma) {
  return (fisher_forget * forget_scale + eps) / (fisher_retain * retain_scale + eps) >= gamma;
}

} // namespace unlearn
