// accumulate_fisher_: F += weight * g^2 over a list.
#pragma once

#include "../tensors/operands.h"

namespace unlearn {

// run(fisher, grads, weight): the backend's kernel.
template <auto run>
void accumulate_fisher_(TensorList fisher, TensorList grads, double weight) {
  if (fisher.empty() && grads.empty()) return;
  Operands operands("accumulate_fisher_", "fisher", fisher);
  operands.check_list({"fisher", &fisher}, kStateDtypes);
  operands.check_list({"grads", &grads}, kWeightDtypes, /*may_be_absent=*/false);
  operands.check_writable({{"fisher", &fisher}});
  operands.make_reference_dense(/*written=*/true);
  operands.align(grads, /*written=*/false);
  run(fisher, grads, weight);
  operands.write_back();
}

} // namespace unlearn
