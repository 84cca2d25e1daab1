// Strips of weights in the opmath type. Tensors of that dtype are used in place; others are converted through a
// buffer that stays in the first-level cache, so no operator is instantiated once per combination of dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "../tensors/chunks.h"
#include "../tensors/operands.h"

// Says that the lanes of a loop do not alias: `__restrict` alone is lost when GCC inlines, and the loop would be
// compiled twice, with a check in between.
#if defined(__clang__)
#define UNLEARN_LANES _Pragma("clang loop vectorize(assume_safety)")
#else
#define UNLEARN_LANES _Pragma("GCC ivdep")
#endif

namespace unlearn {

constexpr int kStrip = 256;
static_assert(kStrip % kWordBits == 0, "a strip is made of whole words");

template <typename T>
constexpr ScalarType kOpmath = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// Converts `n` values from element `begin` into `buffer`; the dtype differs from T.
template <typename T>
void convert_strip(const RawList& list, size_t tensor, std::int64_t begin, int n, T* buffer);

// Rounds n floats to float16, to nearest even.
void float_to_half(const float* from, std::uint16_t* to, int n);

// Returns `n` values from element `begin` in the opmath type: the tensor's own memory, or `buffer` after conversion.
template <typename T>
inline const T* load_strip(const RawList& list, size_t tensor, std::int64_t begin, int n, T* buffer) {
  if (list.dtype[tensor] == kOpmath<T>) return list.at<T>(tensor, begin);
  convert_strip(list, tensor, begin, n, buffer);
  return buffer;
}

// As load_strip, for loops over whole words: a partial last word is read from `buffer`, padded with zeros.
template <typename T>
inline const T* load_words(const RawList& list, size_t tensor, std::int64_t begin, int n, T* buffer) {
  const T* values = load_strip(list, tensor, begin, n, buffer);
  if (n % kWordBits == 0) return values;
  if (values != buffer) std::copy(values, values + n, buffer);
  std::fill(buffer + n, buffer + word_count(n) * kWordBits, T(0));
  return buffer;
}

// Where a loop over whole words may write its results: the tensor's own memory, or `buffer`.
template <typename T>
inline T* place_words(const RawList& list, size_t tensor, std::int64_t begin, int n, T* buffer) {
  return list.dtype[tensor] == kOpmath<T> && n % kWordBits == 0 ? list.at<T>(tensor, begin) : buffer;
}

// Rounds `n` values to the tensor's dtype, to nearest even, and writes them from element `begin`.
template <typename T>
void store_strip(const RawList& list, size_t tensor, std::int64_t begin, int n, const T* values);

// A tensor's last, partial word as a full one, so that the inner loops run over exactly 32 lanes and are
// instantiated once. The padding is zero.
template <typename T>
struct PaddedWord {
  T lanes[kWordBits];

  T* fill(const T* from, int n) {
    std::copy(from, from + n, lanes);
    std::fill(lanes + n, lanes + kWordBits, T(0));
    return lanes;
  }
};

inline std::uint32_t word_at(const RawList& bits, size_t tensor, std::int64_t word) {
  return bits.empty() ? ~0u : bits.at<const std::uint32_t>(tensor, 0)[word];
}

// Runs body(i) for every i below `count` on PyTorch's thread pool.
template <typename Body>
inline void in_parallel(std::int64_t count, const Body& body) {
  if (count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) body(i);
  });
}

// Runs body(block) for all blocks on PyTorch's thread pool.
template <typename Body>
inline void for_each_block(const WorkRange& work, const Body& body) {
  in_parallel(work.blocks(), body);
}

// Cuts one piece of a tensor into strips: body(first weight, number of weights <= kStrip).
template <typename Body>
inline void for_each_strip(std::int64_t begin, std::int64_t count, const Body& body) {
  for (std::int64_t done = 0; done < count; done += kStrip) {
    body(begin + done, int(std::min<std::int64_t>(kStrip, count - done)));
  }
}

} // namespace unlearn
