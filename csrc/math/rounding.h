// Between bfloat16 and float: the nearest-even rounding of PyTorch, and unbiased stochastic rounding.
#pragma once

#include <cstdint>

#include "bits.h"

namespace unlearn {

UNLEARN_INLINE float bfloat16_to_float(std::uint16_t bits) {
  return from_bits<float>(std::uint32_t(bits) << 16);
}

UNLEARN_INLINE std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u; // rounding could carry a NaN into an infinity
  return std::uint16_t(nan ? 0x7fc0u : rounded);
}

// A 32-bit avalanche mix: a bijection in which every input bit changes every output bit with probability ~1/2.
UNLEARN_INLINE std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// One stream per (seed, tensor); counter-based, so the cut into chunks and threads cannot change the numbers.
UNLEARN_INLINE std::uint32_t rounding_stream(std::uint64_t seed, std::uint64_t tensor) {
  return mix(mix(mix(std::uint32_t(seed)) + std::uint32_t(seed >> 32)) + std::uint32_t(tensor));
}

UNLEARN_INLINE std::uint32_t rounding_noise(std::uint32_t stream, std::uint64_t index) {
  return mix(mix(std::uint32_t(index) ^ stream) + std::uint32_t(index >> 32));
}

// Rounds up with probability equal to the fraction that truncation would lose, so the mean is the value.
UNLEARN_INLINE std::uint16_t float_to_bfloat16_stochastic(float value, std::uint32_t noise) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t rounded = (bits + (noise & 0xffffu)) >> 16;
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? std::uint16_t(rounded) : float_to_bfloat16(value);
}

} // namespace unlearn
