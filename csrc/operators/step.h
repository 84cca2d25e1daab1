// step_: the fused update of a list of weights in one pass over memory.
#pragma once

#include "../math/step.h"
#include "../tensors/operands.h"

namespace unlearn {

// One call, checked, with every list in the weights' memory order. Lists that are absent are empty.
struct StepCall {
  const TensorList &weights, &slow, &exp_avg, &exp_avg_sq, &forget, &retain, &bits;
  const Tensor& scalars; // kScalarCount doubles, on the weights' device or on the CPU
  Rule rule;
  bool mask_retain, protect, stochastic;
  std::uint64_t seed;
};

void check_scalars(const char* op, const Tensor& scalars, const Tensor& weight);

// run(call): the backend's kernel. It writes nothing when scalars[kSkip] is set. Without gradients only the
// interpolation happens.
template <auto run>
void step_(
    TensorList weights, TensorList slow, TensorList exp_avg, TensorList exp_avg_sq, TensorList forget_grads,
    TensorList retain_grads, TensorList bits, Tensor scalars, std::int64_t rule_code, bool mask_retain, bool protect,
    std::int64_t rounding_seed) {
  if (weights.empty()) fail("step_: weights: expected at least one tensor, got none");
  if (rule_code < 0 || rule_code > int(Rule::adamw)) {
    fail("step_: rule: expected 0 (sgd) to 3 (adamw), got " + std::to_string(rule_code));
  }
  const Rule rule = Rule(rule_code);
  check_scalars("step_", scalars, weights[0]);
  const bool stepped = !forget_grads.empty() || !retain_grads.empty();
  if (!stepped && slow.empty()) {
    fail("step_: forget_grads, retain_grads: expected at least one list of gradients, got none");
  }
  if (protect && bits.empty()) fail("step_: protect: expected bits that say what to protect, got none");

  Operands operands("step_", "weights", weights);
  operands.check_list({"weights", &weights}, kWeightDtypes);
  operands.check_list({"forget_grads", &forget_grads}, kWeightDtypes);
  operands.check_list({"retain_grads", &retain_grads}, kWeightDtypes);
  operands.check_state({"slow", &slow}, /*required=*/false);
  operands.check_state({"first_moments", &exp_avg}, /*required=*/stepped && has_exp_avg(rule));
  operands.check_state({"second_moments", &exp_avg_sq}, /*required=*/stepped && has_exp_avg_sq(rule));
  operands.check_bits({"bits", &bits});
  operands.check_writable(
      {{"weights", &weights}, {"slow", &slow}, {"first_moments", &exp_avg}, {"second_moments", &exp_avg_sq}});

  operands.make_reference_dense(/*written=*/true);
  for (TensorList* list : {&slow, &exp_avg, &exp_avg_sq}) operands.align(*list, /*written=*/true);
  for (TensorList* list : {&forget_grads, &retain_grads}) operands.align(*list, /*written=*/false);
  run(StepCall{
      weights, slow, exp_avg, exp_avg_sq, forget_grads, retain_grads, bits, scalars, rule, mask_retain, protect,
      rounding_seed >= 0, std::uint64_t(rounding_seed)});
  operands.write_back();
}

} // namespace unlearn
