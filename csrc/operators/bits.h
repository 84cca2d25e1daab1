// pack_bits, unpack_bits, count_bits: between bool tensors and one bit per weight, in memory order.
#pragma once

#include "../tensors/operands.h"

namespace unlearn {

// run(masks, bits)
template <auto run>
TensorList pack_bits(TensorList masks) {
  if (masks.empty()) return {};
  Operands operands("pack_bits", "masks", masks);
  operands.check_list({"masks", &masks}, kBool);
  operands.make_reference_dense(/*written=*/false);
  TensorList bits;
  bits.reserve(masks.size());
  for (const Tensor& mask : masks) bits.push_back(empty_words(mask));
  run(masks, bits);
  return bits;
}

// run(bits, masks)
template <auto run>
TensorList unpack_bits(TensorList bits, TensorList like) {
  if (bits.empty() && like.empty()) return {};
  Operands operands("unpack_bits", "like", like);
  operands.check_bits({"bits", &bits}, /*may_be_absent=*/false);
  TensorList masks;
  masks.reserve(like.size());
  for (const Tensor& tensor : like) masks.push_back(empty_in_order(tensor, ScalarType::Bool));
  run(bits, masks);
  return masks;
}

// run(bits, counts)
template <auto run>
Tensor count_bits(TensorList bits) {
  if (bits.empty()) fail("count_bits: bits: expected at least one tensor, got none");
  Operands operands("count_bits", "bits", bits);
  operands.check_list({"bits", &bits}, kInt);
  operands.make_reference_dense(/*written=*/false);
  Tensor counts = empty_flat(bits[0], std::int64_t(bits.size()), ScalarType::Long);
  run(bits, counts);
  return counts;
}

} // namespace unlearn
