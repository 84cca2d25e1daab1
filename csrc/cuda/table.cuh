// A list of tensors as one kernel parameter.
//
// A kernel parameter reaches every block through the constant cache, needs no memory of its own and no copy that
// could go stale: gradients have other addresses in every step. It holds at most 32,764 bytes, so a longer list takes
// several launches: capacity_for() says how many tensors one launch takes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../math/bits.h"

namespace unlearn {

// The tests that run threads one after the other take fewer.
#ifndef UNLEARN_CUDA_THREADS
#define UNLEARN_CUDA_THREADS 256
#endif
constexpr int kThreads = UNLEARN_CUDA_THREADS;
constexpr int kOctet = 8;  // weights that a thread has in hand at once: one byte of a mask
constexpr int kPasses = 2; // octets of a thread
constexpr std::int64_t kChunk = std::int64_t(kThreads) * kOctet * kPasses; // weights of a block

// How a column's numbers are stored.
enum class Storage : std::uint32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Which part of a list a launch has, column by column. A column is one operand's pointers.
struct Table {
  static constexpr int kWords = 4032;
  static constexpr int kMixed = 4; // columns, at the most, whose storage may differ from tensor to tensor
  static constexpr int kIndexBits = 24;

  std::uint32_t tensors = 0, columns = 0, capacity = 0, units = 0;
  std::uint64_t words[kWords];

  // Pointers, a size and one word for the rest: each tensor takes columns + 2 words.
  static constexpr int capacity_for(int columns) {
    return kWords / (columns + 2);
  }

  UNLEARN_INLINE char* pointer(int column, int tensor) const {
    return reinterpret_cast<char*>(words[column * capacity + tensor]);
  }
  UNLEARN_INLINE std::int64_t size(int tensor) const {
    return std::int64_t(words[columns * capacity + tensor]);
  }
  // The tensor's first unit of work, counted over the launch.
  UNLEARN_INLINE std::uint32_t first_unit(int tensor) const {
    return std::uint32_t(words[(columns + 1) * capacity + tensor] >> 32);
  }
  // The tensor's place in the operator's list.
  UNLEARN_INLINE std::uint32_t index(int tensor) const {
    return std::uint32_t(words[(columns + 1) * capacity + tensor] >> (2 * kMixed)) & ((1u << kIndexBits) - 1);
  }
  UNLEARN_INLINE Storage storage(int which, int tensor) const {
    return Storage(std::uint32_t(words[(columns + 1) * capacity + tensor] >> (2 * which)) & 3u);
  }
  // The tensor that has a unit: the last one that begins at it or before. Launches have no empty tensors.
  UNLEARN_INLINE int tensor_of(std::uint32_t unit) const {
    int low = 0, high = int(tensors) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_unit(middle) <= unit) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

static_assert(Table::capacity_for(5) >= 538, "diffusers' DiT-XL/2 has 538 tensors; AdamW's two steps take 5 columns");
static_assert(2 * Table::kMixed + Table::kIndexBits == 32, "storages and index share half a word");

} // namespace unlearn
