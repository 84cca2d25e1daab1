#include "step.h"

namespace unlearn {

void check_scalars(const char* op, const Tensor& scalars, const Tensor& weight) {
  const bool reachable = scalars.is_cpu() || scalars.device() == weight.device();
  if (scalars.scalar_type() == ScalarType::Double && scalars.is_contiguous() && reachable &&
      scalars.numel() == kScalarCount) {
    return;
  }
  fail(
      std::string(op) + ": scalars: expected a contiguous float64 tensor of " + std::to_string(int(kScalarCount)) +
      " numbers as ops.scalars() makes it, on the weights' device or the CPU, got " +
      torch::headeronly::toString(scalars.scalar_type()) + " of shape " + shape_of(scalars));
}

} // namespace unlearn
