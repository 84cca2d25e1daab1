// Partial sums of thread blocks, and their combination by the balanced tree of math/reduce.h: the tree over all of them
// is the same tree whether one thread walks it or each level is a launch, so the sums do not depend on how it is cut.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "launch.cuh"

namespace unlearn {

constexpr std::int64_t kCombined = 2 * kThreads; // partial sums that a thread block makes one of: a power of two

template <typename Partial>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const Partial* partials, std::int64_t count, Partial* combined) {
  __shared__ Partial sums[kCombined];
  const std::int64_t begin = std::int64_t(blockIdx.x) * kCombined;
  const int n = count - begin < kCombined ? int(count - begin) : int(kCombined);
  for (int i = threadIdx.x; i < n; i += kThreads) sums[i] = partials[begin + i];
  for (int stride = 1; stride < n; stride *= 2) {
    __syncthreads();
    const int i = 2 * stride * threadIdx.x;
    if (i + stride < n) sums[i].add(sums[i + stride]);
  }
  __syncthreads();
  if (threadIdx.x == 0) combined[blockIdx.x] = sums[0];
}

// Room for one partial sum of each block, and for the levels of the tree above them.
template <typename Partial>
class Partials {
 public:
  Partials(const Tensor& like, std::int64_t count)
      : count_(count), buffer_(empty_flat(like, kDoubles * (count + groups_of(count)), ScalarType::Double)) {}

  Partial* data() const {
    return static_cast<Partial*>(buffer_.data_ptr());
  }

  // Writes the sum of them all; needs at least one.
  void combine(const OnDevice& device, const char* op, Partial* result) const {
    Partial *from = data(), *to = from + count_;
    for (std::int64_t count = count_, groups;; count = groups) {
      groups = groups_of(count);
      device.launch(
          op, combine_kernel<Partial>, std::uint32_t(groups), static_cast<const Partial*>(from), count,
          groups == 1 ? result : to);
      if (groups == 1) return;
      std::swap(from, to);
    }
  }

 private:
  static constexpr std::int64_t kDoubles = std::int64_t(sizeof(Partial) / sizeof(double));
  static_assert(sizeof(Partial) % sizeof(double) == 0, "partial sums are kept as doubles");

  static std::int64_t groups_of(std::int64_t count) {
    return (count + kCombined - 1) / kCombined;
  }

  std::int64_t count_;
  Tensor buffer_;
};

} // namespace unlearn
