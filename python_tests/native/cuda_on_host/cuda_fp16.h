// The conversions of CUDA's header that csrc/cuda uses, by PyTorch's own.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

using __half = c10::Half;

inline __half __ushort_as_half(std::uint16_t bits) {
  return c10::Half(bits, c10::Half::from_bits());
}
inline std::uint16_t __half_as_ushort(__half value) {
  return value.x;
}
inline float __half2float(__half value) {
  return static_cast<float>(value);
}
inline __half __float2half_rn(float value) {
  return c10::Half(value);
}
