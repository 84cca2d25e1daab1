// What the memory allows: the same-traffic loop that judges the operators, and the triad that judges the loop.
//
// The loop reads and writes what an operator reads and writes, in the operator's own blocks and words, on the same
// threads, and does next to nothing with it: it folds every stream into one by exclusive or, and writes back what it
// found. `mask` is 0, which the compiler does not know; so the loop may run over the operator's own tensors, at the
// same addresses, and leaves them as they are.
//
// A library of its own, with its own namespace: built only where something is measured.
#include <array>
#include <stdexcept>
#include <utility>

#include "../cpu/strips.h"

namespace unlearn {
namespace {

constexpr int kMaxUpdated = 4, kMaxRead = 2; // weights, slow weights and two moments; two gradients

// Streams of one call, stream after stream: the tensors of the first, then those of the second, ...
struct Traffic {
  RawList updated, read, words_read, words_written;
  size_t tensors;
  std::uint32_t mask;
};

// One piece of a tensor. First: what the first updated stream holds, the weights; the others are float32. Read: what
// the gradients hold.
template <typename First, typename Read, int updated, int read>
std::uint32_t pass(const Traffic& traffic, size_t t, std::int64_t begin, std::int64_t count) {
  First* to_first = updated ? traffic.updated.at<First>(t, begin) : nullptr;
  std::array<std::uint32_t*, kMaxUpdated> to{};
  for (size_t s = 1; s < updated; ++s) to[s] = traffic.updated.at<std::uint32_t>(s * traffic.tensors + t, begin);
  std::array<const Read*, kMaxRead> from{};
  for (size_t s = 0; s < read; ++s) from[s] = traffic.read.at<Read>(s * traffic.tensors + t, begin);

  std::uint32_t sink[kWordBits] = {};
  const auto fold = [&](std::int64_t offset, int lanes) __attribute__((always_inline)) {
    const std::int64_t word = (begin + offset) / kWordBits;
    const std::uint32_t bits = traffic.words_read.empty() ? 0u : traffic.words_read.at<std::uint32_t>(t, 0)[word];
    UNLEARN_LANES
    for (int i = 0; i < lanes; ++i) {
      std::uint32_t all = bits;
      if constexpr (read > 0) all ^= from[0][offset + i];
      if constexpr (read > 1) all ^= from[1][offset + i];
      if constexpr (updated == 0) sink[i] ^= all;
      const std::uint32_t nothing = all & traffic.mask;
      if constexpr (updated > 0) to_first[offset + i] = First(to_first[offset + i] ^ nothing);
      if constexpr (updated > 1) to[1][offset + i] ^= nothing;
      if constexpr (updated > 2) to[2][offset + i] ^= nothing;
      if constexpr (updated > 3) to[3][offset + i] ^= nothing;
    }
    if (!traffic.words_written.empty()) traffic.words_written.at<std::uint32_t>(t, 0)[word] = sink[0];
  };
  std::int64_t offset = 0;
  for (; offset + kWordBits <= count; offset += kWordBits) fold(offset, kWordBits);
  if (offset < count) fold(offset, int(count - offset));
  std::uint32_t all = 0; // where the numbers go when there is no stream to write
  for (std::uint32_t lane : sink) all ^= lane;
  return all;
}

using Pass = std::uint32_t (*)(const Traffic&, size_t, std::int64_t, std::int64_t);

template <typename First, typename Read, int updated, int read>
Pass select_counts(size_t updated_streams, size_t read_streams) {
  if constexpr (updated > 0) {
    if (updated_streams < size_t(updated))
      return select_counts<First, Read, updated - 1, read>(updated_streams, read_streams);
  }
  if constexpr (read > 0) {
    if (read_streams < size_t(read))
      return select_counts<First, Read, updated, read - 1>(updated_streams, read_streams);
  }
  return pass<First, Read, updated, read>;
}

template <typename First>
Pass select_read(bool narrow, size_t updated, size_t read) {
  return narrow ? select_counts<First, std::uint16_t, kMaxUpdated, kMaxRead>(updated, read)
                : select_counts<First, std::uint32_t, kMaxUpdated, kMaxRead>(updated, read);
}

bool is_narrow(const TensorList& list) {
  return !list.empty() && list[0].element_size() == 2;
}

std::int64_t same_traffic(
    TensorList updated, TensorList read, TensorList words_read, TensorList words_written, std::int64_t tensors,
    std::int64_t mask) {
  const size_t n = size_t(tensors), updated_streams = updated.size() / n, read_streams = read.size() / n;
  if (updated_streams > kMaxUpdated || read_streams > kMaxRead) {
    throw std::runtime_error("same_traffic_: expected no more streams than an operator has");
  }
  const Pass run = is_narrow(updated) ? select_read<std::uint16_t>(is_narrow(read), updated_streams, read_streams)
                                      : select_read<std::uint32_t>(is_narrow(read), updated_streams, read_streams);
  const Traffic traffic{RawList(updated),   RawList(read), RawList(words_read), RawList(words_written), n,
                        std::uint32_t(mask)};
  std::vector<std::int64_t> sizes = sizes_of(updated.empty() ? read : updated);
  sizes.resize(n);
  const WorkRange work(std::move(sizes));
  std::uint32_t sink = 0;
  for_each_block(work, [&](std::int64_t block) {
    std::uint32_t all = 0;
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      all ^= run(traffic, t, begin, count);
    });
    __atomic_fetch_xor(&sink, all, __ATOMIC_RELAXED);
  });
  return std::int64_t(sink);
}

// STREAM's triad, a = b + scale * c, over lists of float32 tensors. With b = a no line is fetched only to be
// overwritten, and every byte that moves is counted.
void triad(TensorList a, TensorList b, TensorList c, double scale) {
  const RawList to(a), left(b), right(c);
  const WorkRange work(sizes_of(a));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      float* x = to.at<float>(t, begin);
      const float *y = left.at<float>(t, begin), *z = right.at<float>(t, begin);
      const float s = float(scale);
      UNLEARN_LANES
      for (std::int64_t i = 0; i < count; ++i) x[i] = y[i] + s * z[i];
    });
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext_bench, CPU, m) {
  m.impl("same_traffic_", TORCH_BOX(&unlearn::same_traffic));
  m.impl("triad_", TORCH_BOX(&unlearn::triad));
}
