// update: the plain step as a function of its operands and scalars, and the derivative of that function.
#pragma once

#include <tuple>

#include "../math/step.h"
#include "../tensors/operands.h"
#include "step.h"

namespace unlearn {

// One call, checked, with every list in the weights' memory order. Lists that are absent are empty.
struct UpdateCall {
  const TensorList &weights, &slow, &forget, &retain, &bits;
  const Tensor& scalars; // kScalarCount doubles as for step_; kSkip is not read
  bool mask_retain;

  bool stepped() const {
    return !forget.empty() || !retain.empty();
  }
};

// The gradients to compute, in the weights' memory order, and the sums for those of the scalars. One that no
// caller needs is an empty list, or a scalar gradient without elements.
struct UpdateGradients {
  TensorList weights, slow, forget, retain;
  Tensor scalars;
};

// The checks and the arrangement that the function and its derivative have in common.
inline void arrange_update(
    const char* op, TensorList& weights, TensorList& slow, TensorList& forget_grads, TensorList& retain_grads,
    TensorList& bits, const Tensor& scalars, TensorList* grad_outputs = nullptr) {
  if (weights.empty()) fail(std::string(op) + ": weights: expected at least one tensor, got none");
  check_scalars(op, scalars, weights[0]);
  if (forget_grads.empty() && retain_grads.empty() && slow.empty()) {
    fail(std::string(op) + ": forget_grads, retain_grads: expected at least one list of gradients, got none");
  }
  Operands operands(op, "weights", weights);
  operands.check_list({"weights", &weights}, kWeightDtypes);
  operands.check_list({"forget_grads", &forget_grads}, kWeightDtypes);
  operands.check_list({"retain_grads", &retain_grads}, kWeightDtypes);
  operands.check_state({"slow", &slow}, /*required=*/false);
  operands.check_bits({"bits", &bits});
  if (grad_outputs) operands.check_list({"output_grads", grad_outputs}, kWeightDtypes, /*may_be_absent=*/false);

  operands.make_reference_dense(/*written=*/false);
  for (TensorList* list : {&slow, &forget_grads, &retain_grads}) operands.align(*list, /*written=*/false);
  if (grad_outputs) operands.align(*grad_outputs, /*written=*/false);
}

// run(call, results): the backend's kernel. Without gradients only the interpolation happens.
template <auto run>
TensorList update(
    TensorList weights, TensorList slow, TensorList forget_grads, TensorList retain_grads, TensorList bits,
    Tensor scalars, bool mask_retain) {
  arrange_update("update", weights, slow, forget_grads, retain_grads, bits, scalars);
  TensorList results;
  results.reserve(weights.size());
  for (const Tensor& weight : weights) results.push_back(empty_in_order(weight, weight.scalar_type()));
  run(UpdateCall{weights, slow, forget_grads, retain_grads, bits, scalars, mask_retain}, results);
  return results;
}

// run(call, output gradients, gradients): the backend's kernel. It reads what a gradient that is needed takes,
// once, and sums the gradients of the scalars in the same pass and in a fixed order.
template <auto run>
std::tuple<TensorList, TensorList, TensorList, TensorList, Tensor> update_backward(
    TensorList grad_outputs, TensorList weights, TensorList slow, TensorList forget_grads, TensorList retain_grads,
    TensorList bits, Tensor scalars, bool mask_retain, bool for_weights, bool for_slow, bool for_forget,
    bool for_retain, bool for_scalars) {
  arrange_update("update_backward", weights, slow, forget_grads, retain_grads, bits, scalars, &grad_outputs);
  const auto gradients_of = [&](const TensorList& list, bool needed) {
    TensorList gradients;
    for (size_t i = 0; needed && i < list.size(); ++i) {
      gradients.push_back(empty_in_order(weights[i], list[i].scalar_type()));
    }
    return gradients;
  };
  const UpdateGradients gradients{
      gradients_of(weights, for_weights), gradients_of(slow, for_slow), gradients_of(forget_grads, for_forget),
      gradients_of(retain_grads, for_retain), empty_flat(scalars, for_scalars ? kScalarCount : 0, ScalarType::Double)};
  run(UpdateCall{weights, slow, forget_grads, retain_grads, bits, scalars, mask_retain}, grad_outputs, gradients);
  return {gradients.weights, gradients.slow, gradients.forget, gradients.retain, gradients.scalars};
}

} // namespace unlearn
