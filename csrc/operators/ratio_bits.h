// ratio_bits: the saliency mask of two Fisher diagonals as packed bits, and how many weights it keeps.
#pragma once

#include <tuple>

#include "../tensors/operands.h"

namespace unlearn {

struct RatioOptions {
  double gamma, eps, forget_scale, retain_scale;
};

// run(forget, retain, options, bits, counts): the backend's kernel; it writes every word and every count.
template <auto run>
std::tuple<TensorList, Tensor> ratio_bits(
    TensorList forget_fisher, TensorList retain_fisher, double gamma, double eps, double forget_scale,
    double retain_scale) {
  if (forget_fisher.empty()) fail("ratio_bits: forget_fisher: expected at least one tensor, got none");
  Operands operands("ratio_bits", "forget_fisher", forget_fisher);
  operands.check_list({"forget_fisher", &forget_fisher}, kStateDtypes);
  operands.check_list({"retain_fisher", &retain_fisher}, kStateDtypes, /*may_be_absent=*/false);
  operands.make_reference_dense(/*written=*/false);
  operands.align(retain_fisher, /*written=*/false);

  TensorList bits;
  bits.reserve(forget_fisher.size());
  for (const Tensor& tensor : forget_fisher) bits.push_back(empty_words(tensor));
  Tensor counts = empty_flat(forget_fisher[0], std::int64_t(forget_fisher.size()), ScalarType::Long);
  run(forget_fisher, retain_fisher, RatioOptions{gamma, eps, forget_scale, retain_scale}, bits, counts);
  return {bits, counts};
}

} // namespace unlearn
