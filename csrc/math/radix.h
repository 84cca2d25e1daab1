// Selection of the k largest scores by the digits of their bits, from the most significant one down: no sort.
//
// A pass counts, among the weights that still tie, how often each value of the next digit occurs; the counts say which
// value the k-th largest score has there. The search ends with the last digit, or as soon as all that tie are kept.
#pragma once

#include <cstdint>

#include "bits.h"

namespace unlearn {

constexpr int kDigitBits = 11; // three passes over float, six over double
constexpr int kBins = 1 << kDigitBits;

// An unsigned integer for each score, in the order of the scores: -0 equals +0, and NaN comes before -inf.
template <typename T>
UNLEARN_INLINE bits_t<T> order_key(T score) {
  using Key = bits_t<T>;
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  const Key bits = to_bits(score);
  const Key plain = bits == sign ? Key(0) : bits;
  const Key key = plain & sign ? ~plain : plain | sign;
  return score == score ? key : Key(0);
}

// Where the search for the k-th largest key stands. Kept are all weights above it, and `left` of those that tie.
template <typename Key>
struct RadixSearch {
  std::int64_t left;
  Key prefix = 0;                // the digits found so far; the bits below are 0
  Key known = 0;                 // all ones where digits were found
  int unknown = 8 * sizeof(Key); // bits below them
  int digit = 0;                 // the one found last
  bool ended = false;

  UNLEARN_INLINE explicit RadixSearch(std::int64_t k) : left(k) {}

  UNLEARN_INLINE bool ties(Key key) const {
    return (key & known) == prefix;
  }
  UNLEARN_INLINE bool is_above(Key key) const {
    return (key & known) > prefix;
  }
  // Bits up to the next digit. The last digit takes what there is left.
  UNLEARN_INLINE int shift() const {
    return unknown > kDigitBits ? unknown - kDigitBits : 0;
  }
  // The next digit of a key that ties.
  UNLEARN_INLINE std::uint32_t digit_of(Key key) const {
    return std::uint32_t((key & ~known) >> shift());
  }

  // counts[d]: how many of the keys that tie have the next digit d. Needs 1 <= left <= their sum.
  UNLEARN_INLINE void advance(const std::int64_t* counts) {
    for (digit = kBins - 1; counts[digit] < left; --digit) left -= counts[digit];
    unknown = shift();
    prefix |= Key(digit) << unknown;
    known = ~Key(0) << unknown;
    ended = unknown == 0 || counts[digit] == left;
  }
};

} // namespace unlearn
