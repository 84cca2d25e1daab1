// gradient_products: masked norms and inner product of the forget and retain gradients in one read.
#pragma once

#include "../tensors/operands.h"

namespace unlearn {

// run(forget, retain, bits, mask_retain, result): the backend's kernels; a list that is absent is empty. The result
// is four doubles, in the order of struct Products.
template <auto run>
Tensor gradient_products(TensorList forget_grads, TensorList retain_grads, TensorList bits, bool mask_retain) {
  const bool forget = !forget_grads.empty(), retain = !retain_grads.empty();
  if (!forget && !retain) fail("gradient_products: forget_grads, retain_grads: expected at least one list, got none");
  TensorList& reference = forget ? forget_grads : retain_grads;
  Operands operands("gradient_products", forget ? "forget_grads" : "retain_grads", reference);
  operands.check_list({"forget_grads", &forget_grads}, kWeightDtypes);
  operands.check_list({"retain_grads", &retain_grads}, kWeightDtypes);
  operands.check_bits({"bits", &bits});
  operands.make_reference_dense(/*written=*/false);
  if (forget) operands.align(retain_grads, /*written=*/false);
  Tensor result = empty_flat(reference[0], 4, ScalarType::Double);
  run(forget_grads, retain_grads, bits, mask_retain, result);
  return result;
}

} // namespace unlearn
