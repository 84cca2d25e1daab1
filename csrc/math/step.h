// One weight's step, and its derivative. This is the only place where an update rule is written.
//
//   g      = keep ? forget_scale * g_f : 0   +   retain_scale * g_r          (either part may be absent)
//   theta' = rule(theta, g)
//   slow'  = slow + slow_rate * (theta' - slow);  theta' = slow'             (when the round closes)
//
// Everything is computed in the opmath type T: double for double weights, float for all others.
#pragma once

#include <cmath>
#include <cstdint>

#include "bits.h"

namespace unlearn {

enum class Rule : int { sgd = 0, momentum = 1, adam = 2, adamw = 3 };

UNLEARN_INLINE constexpr bool has_exp_avg(Rule rule) {
  return rule != Rule::sgd;
}
UNLEARN_INLINE constexpr bool has_exp_avg_sq(Rule rule) {
  return rule == Rule::adam || rule == Rule::adamw;
}

// Layout of the float64 scalar tensor of a step; `SCALARS` in unlearn_ext/ops/layout.py lists the same names.
// The scalars live in a tensor so that a step never synchronises and can be captured and replayed.
enum ScalarIndex : int {
  kLr,
  kForgetWeight,
  kRetainWeight,
  kForgetClip,
  kRetainClip,
  kMomentum,
  kBeta1,
  kBeta2,
  kEps,
  kWeightDecay,
  kStep,            // 1-based count of the moments, read by the pure-PyTorch path
  kBiasCorrection1, // 1 - beta1^step
  kBiasCorrection2, // 1 - beta2^step
  kSlowRate,
  kInverseScale, // 1 / loss scale, multiplies both gradients
  kSkip,         // non-zero: a gradient was not finite, nothing may be written
  kScalarCount
};

// The scalars in the form the inner loop wants, folded in double and rounded once.
template <typename T>
struct StepScalars {
  T lr, forget_scale, retain_scale, momentum, weight_decay, slow_rate;
  T lerp_weight, beta2, one_minus_beta2, eps;
  bits_t<T> from_exp_avg; // all ones where exp_avg is interpolated from its old value, not from the gradient
  T step_size;            // lr / bias_correction1
  T sqrt_bias_correction2;
  T keep_after_decay; // 1 - lr * weight_decay, the decoupled decay of AdamW
  T keep_of_slow;     // 1 - slow_rate
  bits_t<T> decays;   // all zeros without weight decay: 0 * inf would make an infinite weight a NaN

  UNLEARN_INLINE explicit StepScalars(const double* s)
      : lr(T(s[kLr])),
        forget_scale(T(s[kInverseScale] * s[kForgetWeight] * s[kForgetClip])),
        retain_scale(T(s[kInverseScale] * s[kRetainWeight] * s[kRetainClip])),
        momentum(T(s[kMomentum])),
        weight_decay(T(s[kWeightDecay])),
        slow_rate(T(s[kSlowRate])),
        lerp_weight(T(s[kBeta1] > 0.5 ? 1.0 - s[kBeta1] : -s[kBeta1])),
        beta2(T(s[kBeta2])),
        one_minus_beta2(T(1.0 - s[kBeta2])),
        eps(T(s[kEps])),
        from_exp_avg(bits_t<T>(0) - bits_t<T>(s[kBeta1] > 0.5)),
        step_size(T(s[kLr] / s[kBiasCorrection1])),
        sqrt_bias_correction2(T(std::sqrt(s[kBiasCorrection2]))),
        keep_after_decay(T(1.0 - s[kLr] * s[kWeightDecay])),
        keep_of_slow(T(1.0 - s[kSlowRate])),
        decays(bits_t<T>(0) - bits_t<T>(s[kWeightDecay] != 0.0)) {}
};

// A weight and its state, by torch's names. The momentum rule keeps its momentum_buffer where Adam keeps exp_avg.
// Members that a rule does not use are never read.
template <typename T>
struct WeightState {
  T theta, exp_avg, exp_avg_sq, slow;
};

template <Rule rule, typename T>
UNLEARN_INLINE void apply_rule(WeightState<T>& w, T g, const StepScalars<T>& s) {
  // Weight decay: of the weight itself (AdamW), or added to the gradient (all others).
  if constexpr (rule == Rule::adamw) {
    w.theta = w.theta * s.keep_after_decay;
  } else {
    g = g + s.weight_decay * keep_or_zero(s.decays, w.theta);
  }
  // The rule.
  if constexpr (rule == Rule::sgd) {
    w.theta = w.theta - s.lr * g;
  } else if constexpr (rule == Rule::momentum) {
    T& momentum_buffer = w.exp_avg;
    momentum_buffer = s.momentum * momentum_buffer + g;
    w.theta = w.theta - s.lr * momentum_buffer;
  } else {
    // Moments. From the nearer end, as torch.lerp does: with beta1 = 0 the moment is the gradient exactly.
    w.exp_avg = select(s.from_exp_avg, w.exp_avg, g) + s.lerp_weight * (g - w.exp_avg);
    w.exp_avg_sq = s.beta2 * w.exp_avg_sq + s.one_minus_beta2 * g * g;
    // The step, with the moments' bias corrected.
    const T denominator = std::sqrt(w.exp_avg_sq) / s.sqrt_bias_correction2 + s.eps;
    w.theta = w.theta - s.step_size * w.exp_avg / denominator;
  }
}

// forget, retain: which gradients exist. interpolate: the round closes with this step.
// keep_forget, keep_retain: all ones where that gradient counts. touch: all ones where the weight may change at
// all (protect=True clears it), so that a protected weight keeps its exact bits, moments and slow weight included.
template <Rule rule, bool forget, bool retain, bool interpolate, typename T>
UNLEARN_INLINE WeightState<T> update_weight(
    const WeightState<T>& before, T g_forget, T g_retain, bits_t<T> keep_forget, bits_t<T> keep_retain, bits_t<T> touch,
    const StepScalars<T>& s) {
  WeightState<T> after = before;
  if constexpr (forget || retain) {
    // One gradient of the two, each weighed and masked by itself.
    T g = T(0);
    if constexpr (forget) {
      g = keep_or_zero(keep_forget, s.forget_scale * g_forget);
    }
    if constexpr (retain) {
      g = g + keep_or_zero(keep_retain, s.retain_scale * g_retain);
    }
    apply_rule<rule>(after, g, s);
  }
  // The round closes: slow weights follow the fast ones part of the way, and the fast ones go back to them.
  if constexpr (interpolate) {
    after.slow = before.slow + s.slow_rate * (after.theta - before.slow);
    after.theta = after.slow;
    after.slow = select(touch, after.slow, before.slow);
  }
  // A protected weight takes everything back.
  after.theta = select(touch, after.theta, before.theta);
  if constexpr ((forget || retain) && has_exp_avg(rule)) {
    after.exp_avg = select(touch, after.exp_avg, before.exp_avg);
  }
  if constexpr ((forget || retain) && has_exp_avg_sq(rule)) {
    after.exp_avg_sq = select(touch, after.exp_avg_sq, before.exp_avg_sq);
  }
  return after;
}

// The derivative of update_weight<Rule::sgd, ...> where every weight may be touched.
//
// theta' is linear in each operand: an operand's gradient is a constant times d, the gradient of theta'. It is
// linear in each scalar too, so that four inner products with d give the gradients of them all.
struct UpdateSums {
  double forget = 0, retain = 0; // d . g_f and d . g_r, where they are kept
  double theta = 0;              // d . theta
  double drift = 0;              // d . (theta - slow)

  UNLEARN_INLINE void add(const UpdateSums& other) {
    forget += other.forget;
    retain += other.retain;
    theta += other.theta;
    drift += other.drift;
  }
};

// The gradients of one weight's operands, and its terms of the sums.
template <typename T>
struct UpdateGradient {
  T theta, slow, forget, retain;
  UpdateSums terms;
};

// Template parameters and masks as for update_weight. The terms are exact in double for float operands.
template <bool forget, bool retain, bool interpolate, typename T>
UNLEARN_INLINE UpdateGradient<T> update_gradient(
    T d, const WeightState<T>& before, T g_forget, T g_retain, bits_t<T> keep_forget, bits_t<T> keep_retain,
    const StepScalars<T>& s) {
  UpdateGradient<T> gradient{};
  const T d_fast = interpolate ? s.slow_rate * d : d; // of theta before the interpolation
  gradient.theta = d_fast;
  if constexpr (interpolate) {
    gradient.slow = s.keep_of_slow * d;
    gradient.terms.drift = double(d) * (double(before.theta) - double(before.slow));
  }
  if constexpr (forget || retain) {
    const T d_g = -s.lr * d_fast;
    gradient.theta = s.keep_after_decay * d_fast;
    gradient.terms.theta = double(d) * double(before.theta);
    if constexpr (forget) {
      gradient.forget = keep_or_zero(keep_forget, s.forget_scale * d_g);
      gradient.terms.forget = double(d) * double(keep_or_zero(keep_forget, g_forget));
    }
    if constexpr (retain) {
      gradient.retain = keep_or_zero(keep_retain, s.retain_scale * d_g);
      gradient.terms.retain = double(d) * double(keep_or_zero(keep_retain, g_retain));
    }
  }
  return gradient;
}

// The gradients of the scalars `s`, in their layout, from the sums over all weights. Sums of parts that are absent
// are zero, and so are the gradients of scalars that the step did not use.
UNLEARN_INLINE void update_scalar_gradients(
    const UpdateSums& sums, bool stepped, bool interpolate, const double* s, double* gradients) {
  for (int i = 0; i < kScalarCount; ++i) gradients[i] = 0.0;
  const double forget = s[kForgetWeight] * s[kForgetClip] * sums.forget;
  const double retain = s[kRetainWeight] * s[kRetainClip] * sums.retain;
  const double step = s[kInverseScale] * (forget + retain) + s[kWeightDecay] * sums.theta; // d . (g + decay)
  const double rate = interpolate ? s[kSlowRate] : 1.0;
  if (stepped) {
    const double slope = -rate * s[kLr];
    gradients[kLr] = -rate * step;
    gradients[kForgetWeight] = slope * s[kInverseScale] * s[kForgetClip] * sums.forget;
    gradients[kForgetClip] = slope * s[kInverseScale] * s[kForgetWeight] * sums.forget;
    gradients[kRetainWeight] = slope * s[kInverseScale] * s[kRetainClip] * sums.retain;
    gradients[kRetainClip] = slope * s[kInverseScale] * s[kRetainWeight] * sums.retain;
    gradients[kInverseScale] = slope * (forget + retain);
    gradients[kWeightDecay] = slope * sums.theta;
  }
  if (interpolate) gradients[kSlowRate] = sums.drift - (stepped ? s[kLr] * step : 0.0);
}

} // namespace unlearn
