// A list of tensors as one range of work.
//
// The range is cut into blocks of whole 32-weight words across tensor borders, so that 300 small tensors occupy all
// threads as well as one large tensor does. The cut depends on the list alone: reductions built on it are
// deterministic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../math/bits.h"

namespace unlearn {

// 4,096 weights: large enough to hide the cost of handing out work, small enough to balance threads and to keep a
// GPU busy.
constexpr std::int64_t kBlockWords = 128;

class WorkRange {
 public:
  // sizes: weights per tensor
  explicit WorkRange(std::vector<std::int64_t> sizes) : sizes_(std::move(sizes)), first_word_(sizes_.size() + 1, 0) {
    for (size_t t = 0; t < sizes_.size(); ++t) first_word_[t + 1] = first_word_[t] + word_count(sizes_[t]);
  }

  std::int64_t blocks() const {
    return (first_word_.back() + kBlockWords - 1) / kBlockWords;
  }

  // Calls visit(tensor, first weight, number of weights) for every piece of a tensor in the block. The first weight
  // is a multiple of 32; the number is one too, except at a tensor's end.
  template <typename Visit>
  void visit_block(std::int64_t block, Visit&& visit) const {
    std::int64_t word = block * kBlockWords;
    const std::int64_t end = std::min(word + kBlockWords, first_word_.back());
    size_t t = std::upper_bound(first_word_.begin(), first_word_.end(), word) - first_word_.begin() - 1;
    for (; word < end; ++t) {
      const std::int64_t stop = std::min(end, first_word_[t + 1]);
      if (stop == word) continue; // an empty tensor
      const std::int64_t begin = (word - first_word_[t]) * kWordBits;
      visit(t, begin, std::min(sizes_[t] - begin, (stop - word) * kWordBits));
      word = stop;
    }
  }

 private:
  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> first_word_;
};

} // namespace unlearn
