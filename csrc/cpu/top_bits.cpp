// top_bits on the CPU.
#include "../operators/top_bits.h"

#include "../math/radix.h"

#include "strips.h"

namespace unlearn {
namespace {

// The list is cut into so many contiguous pieces at most, whatever the threads. Each has counts of its own: nothing is
// shared while they are made, and afterwards they say how many ties each piece keeps, the earlier ones first. 1 MiB.
constexpr std::int64_t kPieces = 64;

struct ScoredList {
  RawList values, other;
  const TopOptions& options;

  bool is_f64(size_t t) const {
    return values.dtype[t] == ScalarType::Double || (!other.empty() && other.dtype[t] == ScalarType::Double);
  }
};

template <Score score, typename T>
void score_strip(const T* values, const T* other, const TopOptions& options, int n, T* scores) {
  const T sf = T(options.forget_scale), sr = T(options.retain_scale), eps = T(options.eps);
  UNLEARN_LANES
  for (int i = 0; i < n; ++i) scores[i] = score_of<score>(values[i], other[i], sf, sr, eps);
}

// The scores of n weights, in the tensor's own memory or in `buffer`. Every pass must see the same bits, so there is
// one copy of this code: inlined twice, it could be contracted to fused multiplications in two ways.
template <typename T>
__attribute__((noinline)) const T* load_scores(const ScoredList& list, size_t t, std::int64_t start, int n, T* buffer) {
  if constexpr (sizeof(T) == 8) {
    if (!list.is_f64(t)) { // the opmath type is the tensor's, whatever the others are; widening keeps the order
      float narrow[kStrip];
      const float* scores = load_scores<float>(list, t, start, n, narrow);
      std::copy(scores, scores + n, buffer);
      return buffer;
    }
  }
  T other_buffer[kStrip];
  const TopOptions& options = list.options;
  const T* values = load_strip(list.values, t, start, n, buffer);
  const T* other = takes_two(options.score) ? load_strip(list.other, t, start, n, other_buffer) : values;
  switch (options.score) {
    case Score::value:
      return values;
    case Score::magnitude:
      score_strip<Score::magnitude>(values, other, options, n, buffer);
      break;
    case Score::product:
      score_strip<Score::product>(values, other, options, n, buffer);
      break;
    case Score::ratio:
      score_strip<Score::ratio>(values, other, options, n, buffer);
      break;
  }
  return buffer;
}

// Calls visit(tensor, first weight, number of weights) for the parts of tensors in one of `pieces` pieces.
template <typename Visit>
void visit_piece(const WorkRange& work, std::int64_t pieces, std::int64_t piece, const Visit& visit) {
  const std::int64_t blocks = work.blocks(), end = blocks * (piece + 1) / pieces;
  for (std::int64_t block = blocks * piece / pieces; block < end; ++block) work.visit_block(block, visit);
}

// Calls visit(word's index, its valid bits, the keys of its 32 weights) for a part of a tensor. T is the widest opmath
// type in the list.
template <typename T, typename Visit>
void for_each_word(const ScoredList& list, size_t t, std::int64_t begin, std::int64_t count, const Visit& visit) {
  for_each_strip(begin, count, [&](std::int64_t start, int n) {
    T buffer[kStrip];
    const T* scores = load_scores(list, t, start, n, buffer);
    for (int offset = 0; offset < n; offset += kWordBits) {
      const int lanes = n - offset;
      const T* __restrict word = scores + offset;
      PaddedWord<T> padded;
      if (lanes < kWordBits) word = padded.fill(word, lanes);
      bits_t<T> keys[kWordBits];
      for (int i = 0; i < kWordBits; ++i) keys[i] = order_key(word[i]);
      visit((start + offset) / kWordBits, valid_bits(lanes), keys);
    }
  });
}

template <typename Key>
inline __attribute__((always_inline)) std::uint32_t ties_of(const RadixSearch<Key>& search, const Key* keys) {
  std::uint32_t word = 0;
  for (int i = 0; i < kWordBits; ++i) word |= std::uint32_t(search.ties(keys[i])) << i;
  return word;
}

template <typename Key>
inline __attribute__((always_inline)) std::uint32_t above_of(const RadixSearch<Key>& search, const Key* keys) {
  std::uint32_t word = 0;
  for (int i = 0; i < kWordBits; ++i) word |= std::uint32_t(search.is_above(keys[i])) << i;
  return word;
}

// counts[d]: how many weights of the piece tie and have the next digit d. Several copies of the counters, against the
// wait for one that has just been written, were measured to be slower.
template <typename T>
void count_digits(
    const ScoredList& list, const WorkRange& work, std::int64_t pieces, std::int64_t piece,
    const RadixSearch<bits_t<T>> search, std::int64_t* counts) {
  std::fill_n(counts, kBins, 0);
  visit_piece(work, pieces, piece, [&](size_t t, std::int64_t begin, std::int64_t count) {
    for_each_word<T>(list, t, begin, count, [&](std::int64_t, std::uint32_t valid, const bits_t<T>* keys) {
      std::uint32_t ties = ties_of(search, keys) & valid;
      if (ties == ~0u) { // as in the first pass
        std::uint32_t digits[kWordBits];
        for (int i = 0; i < kWordBits; ++i) digits[i] = search.digit_of(keys[i]);
        for (int i = 0; i < kWordBits; ++i) ++counts[digits[i]];
      } else {
        for (; ties; ties &= ties - 1) ++counts[search.digit_of(keys[__builtin_ctz(ties)])];
      }
    });
  });
}

// Writes the words of a piece that keeps the first `left` of its ties.
template <typename T>
void write_piece(
    const ScoredList& list, const WorkRange& work, std::int64_t pieces, std::int64_t piece,
    const RadixSearch<bits_t<T>> search, std::int64_t left, const RawList& bits, std::int64_t* kept) {
  visit_piece(work, pieces, piece, [&](size_t t, std::int64_t begin, std::int64_t count) {
    std::int64_t sum = 0;
    std::uint32_t* words = bits.at<std::uint32_t>(t, 0);
    for_each_word<T>(list, t, begin, count, [&](std::int64_t word, std::uint32_t valid, const bits_t<T>* keys) {
      std::uint32_t ties = ties_of(search, keys) & valid;
      if (count_word(ties) > left) ties = lowest_bits(ties, left);
      left -= count_word(ties);
      words[word] = (above_of(search, keys) & valid) | ties;
      sum += count_word(words[word]);
    });
    __atomic_fetch_add(kept + t, sum, __ATOMIC_RELAXED); // integers: any order gives the same sum
  });
}

template <typename T>
void select_top(const ScoredList& list, const WorkRange& work, const RawList& bits, std::int64_t* kept) {
  const std::int64_t pieces = std::min(kPieces, work.blocks());
  std::vector<std::int64_t> counts(size_t(pieces * kBins));
  RadixSearch<bits_t<T>> search(list.options.k);
  while (!search.ended) {
    in_parallel(pieces, [&](std::int64_t piece) {
      count_digits<T>(list, work, pieces, piece, search, counts.data() + piece * kBins);
    });
    std::int64_t totals[kBins] = {};
    for (size_t i = 0; i < counts.size(); ++i) totals[i % kBins] += counts[i];
    search.advance(totals);
  }
  std::int64_t left[kPieces]; // how many of its ties each piece keeps
  for (std::int64_t piece = 0, rest = search.left; piece < pieces; ++piece) {
    left[piece] = std::min(rest, counts[size_t(piece * kBins + search.digit)]);
    rest -= left[piece];
  }
  in_parallel(pieces, [&](std::int64_t piece) {
    write_piece<T>(list, work, pieces, piece, search, left[piece], bits, kept);
  });
}

void write_top_bits(
    const TensorList& scores, const TensorList& other, const TopOptions& options, const TensorList& bits,
    const Tensor& counts) {
  std::int64_t* kept = static_cast<std::int64_t*>(counts.data_ptr());
  std::fill(kept, kept + scores.size(), 0);
  const ScoredList list{RawList(scores), RawList(other), options};
  const RawList words(bits);
  if (options.k == 0) {
    for (size_t t = 0; t < bits.size(); ++t) std::fill_n(words.at<std::uint32_t>(t, 0), bits[t].numel(), 0);
    return;
  }
  const WorkRange work(sizes_of(scores));
  bool f64 = false;
  for (size_t t = 0; t < scores.size(); ++t) f64 = f64 || list.is_f64(t);
  if (f64) {
    select_top<double>(list, work, words, kept);
  } else {
    select_top<float>(list, work, words, kept);
  }
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("top_bits", TORCH_BOX(&unlearn::top_bits<&unlearn::write_top_bits>));
}
