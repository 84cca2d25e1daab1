// Bit words and branch-free selection.
//
// A mask holds one bit per weight: weight i of a tensor, in the tensor's own memory order, is bit i % 32 of
// word i / 32. Selection works on the bits of the numbers, never by multiplication: 0 * inf would leak a NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define UNLEARN_INLINE __host__ __device__ __forceinline__
#else
#define UNLEARN_INLINE inline __attribute__((always_inline))
#endif

namespace unlearn {

constexpr int kWordBits = 32;

template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
};
template <typename T>
using bits_t = typename BitsOf<T>::type;

template <typename T>
UNLEARN_INLINE bits_t<T> to_bits(T value) {
  bits_t<T> bits;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
UNLEARN_INLINE T from_bits(bits_t<T> bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// All ones where the lane's bit is set, all zeros elsewhere.
template <typename T>
UNLEARN_INLINE bits_t<T> lane_mask(std::uint32_t word, int lane) {
  return bits_t<T>(0) - bits_t<T>((word >> lane) & 1u);
}

// keep ? value : +0
template <typename T>
UNLEARN_INLINE T keep_or_zero(bits_t<T> keep, T value) {
  return from_bits<T>(to_bits(value) & keep);
}

// take ? value : otherwise
template <typename T>
UNLEARN_INLINE T select(bits_t<T> take, T value, T otherwise) {
  return from_bits<T>((to_bits(value) & take) | (to_bits(otherwise) & ~take));
}

// Exponent bits all set: inf or NaN.
UNLEARN_INLINE bool is_non_finite(float value) {
  return (to_bits(value) & 0x7f800000u) == 0x7f800000u;
}
UNLEARN_INLINE bool is_non_finite(double value) {
  return (to_bits(value) & 0x7ff0000000000000ull) == 0x7ff0000000000000ull;
}

// Words needed for `weights` bits; every tensor starts at a fresh word.
UNLEARN_INLINE std::int64_t word_count(std::int64_t weights) {
  return (weights + kWordBits - 1) / kWordBits;
}

// The valid bits of a word that stands for `lanes` weights: tail bits are always zero.
UNLEARN_INLINE std::uint32_t valid_bits(int lanes) {
  return lanes >= kWordBits ? ~0u : ((1u << lanes) - 1u);
}

UNLEARN_INLINE int count_word(std::uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// The lowest n of the bits that are set, or all of them where there are fewer.
UNLEARN_INLINE std::uint32_t lowest_bits(std::uint32_t word, std::int64_t n) {
  if (n <= 0) return 0;
  std::uint32_t higher = word;
  for (; n > 0 && higher; --n) higher &= higher - 1;
  return word & ~higher;
}

} // namespace unlearn
