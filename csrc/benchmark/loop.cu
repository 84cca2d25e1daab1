// The same-traffic loop and the triad on CUDA: loop.cpp says what they are for.
//
// Chunks, octets and streaming hints are the operators' own, so the loop moves what an operator moves in the same way.
// A library of its own, as on the CPU.
#include <stdexcept>

#include "../cuda/launch.cuh"
#include "../cuda/octet.cuh"

namespace unlearn {
namespace {

constexpr int kMaxUpdated = 4, kMaxRead = 2; // weights, slow weights and two moments; two gradients

struct Traffic {
  std::uint32_t mask; // 0, which the compiler does not know
  bool words_read, words_written;
  unsigned int* sink; // where the numbers go when there is no stream to write
};

__device__ __forceinline__ bool is_narrow(Storage storage) {
  return storage == Storage::bf16 || storage == Storage::f16;
}

// The stored bits of one number of an octet.
__device__ __forceinline__ std::uint32_t stored_bits(const Octet<float>& octet, Storage storage, int k) {
  return is_narrow(storage) ? half_bits(octet.word, k) : octet.word[k];
}

__device__ __forceinline__ void store_bits(
    char* base, Storage storage, std::int64_t begin, int n, const std::uint32_t* bits) {
  if (is_narrow(storage)) {
    std::uint16_t narrow[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) narrow[k] = std::uint16_t(bits[k]);
    store_halves(base, begin, n, narrow);
  } else {
    float values[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) values[k] = from_bits<float>(bits[k]);
    store_octet(base, begin, n, values);
  }
}

// Columns: the updated streams, the streams that are read, the words that are read, the words that are written. The
// first updated stream and those that are read may be of half width; the others are float32.
template <int updated, int read>
__global__ void __launch_bounds__(kThreads)
    traffic_kernel(const __grid_constant__ Table table, const __grid_constant__ Traffic traffic) {
  const int t = table.tensor_of(blockIdx.x);
  Storage storage[updated + read];
#pragma unroll
  for (int s = 0; s < updated + read; ++s) {
    const bool mixed = s == 0 || s >= updated;
    storage[s] = mixed ? table.storage(s < updated ? 0 : s - updated + (updated > 0), t) : Storage::f32;
  }
  std::uint32_t sink = 0;
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    Octet<float> stored[updated + read];
#pragma unroll
    for (int s = 0; s < updated + read; ++s) load_octet(stored[s], storage[s], table.pointer(s, t), i, n);
    const std::uint32_t byte = traffic.words_read ? load_mask(table.pointer(updated + read, t), i) : 0u;
    std::uint32_t all[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      all[k] = byte;
#pragma unroll
      for (int s = updated; s < updated + read; ++s) all[k] ^= stored_bits(stored[s], storage[s], k);
    }
#pragma unroll
    for (int s = 0; s < updated; ++s) {
      std::uint32_t bits[kOctet];
#pragma unroll
      for (int k = 0; k < kOctet; ++k) bits[k] = stored_bits(stored[s], storage[s], k) ^ (all[k] & traffic.mask);
      store_bits(table.pointer(s, t), storage[s], i, n, bits);
    }
    std::uint32_t folded = 0;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) folded ^= all[k];
    if (traffic.words_written) {
      store_mask(table.pointer(updated + read + traffic.words_read, t), i, table.size(t), folded);
    }
    sink ^= folded;
  });
  if (updated == 0 && (sink & traffic.mask)) atomicAdd(traffic.sink, 1u);
}

__global__ void __launch_bounds__(kThreads) triad_kernel(const __grid_constant__ Table table, float scale) {
  const int t = table.tensor_of(blockIdx.x);
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    Octet<float> left, right;
    load_octet(left, Storage::f32, table.pointer(1, t), i, n);
    load_octet(right, Storage::f32, table.pointer(2, t), i, n);
    float values[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      values[k] = from_bits<float>(left.word[k]) + scale * from_bits<float>(right.word[k]);
    }
    store_octet(table.pointer(0, t), i, n, values);
  });
}

using TrafficKernel = void (*)(Table, Traffic);

template <int updated, int read>
TrafficKernel select_counts(int updated_streams, int read_streams) {
  if constexpr (updated > 0 && updated + read > 1) {
    if (updated_streams < updated) return select_counts<updated - 1, read>(updated_streams, read_streams);
  }
  if constexpr (read > 0 && updated + read > 1) {
    if (read_streams < read) return select_counts<updated, read - 1>(updated_streams, read_streams);
  }
  return traffic_kernel<updated, read>;
}

std::int64_t same_traffic(
    TensorList updated, TensorList read, TensorList words_read, TensorList words_written, std::int64_t tensors,
    std::int64_t mask) {
  const size_t n = size_t(tensors), updated_streams = updated.size() / n, read_streams = read.size() / n;
  if (updated_streams > kMaxUpdated || read_streams > kMaxRead || updated_streams + read_streams == 0) {
    throw std::runtime_error("same_traffic_: expected no more streams than an operator has, and at least one");
  }
  const TensorList& any = updated.empty() ? read : updated;
  const OnDevice device(any[0]);
  std::vector<RawList> streams;
  streams.reserve(updated_streams + read_streams);
  Columns columns;
  for (const TensorList* list : {&updated, &read}) {
    for (size_t begin = 0; begin < list->size(); begin += n) {
      streams.emplace_back(TensorList(list->begin() + begin, list->begin() + begin + n));
      columns.add(streams.back(), /*mixed=*/list == &read || begin == 0);
    }
  }
  const RawList masks(words_read), written(words_written);
  columns.add(masks);
  columns.add(written);

  Traffic traffic{std::uint32_t(mask), !masks.empty(), !written.empty(), nullptr};
  Tensor sink = empty_flat(any[0], 1, ScalarType::Int);
  traffic.sink = static_cast<unsigned int*>(sink.data_ptr());
  const TrafficKernel kernel = select_counts<kMaxUpdated, kMaxRead>(int(updated_streams), int(read_streams));
  std::vector<std::int64_t> sizes = sizes_of(any);
  sizes.resize(n);
  columns.for_each_table(sizes, chunks_of, every_tensor, [&](const Table& table) {
    device.launch("same_traffic_", kernel, table.units, table, traffic);
  });
  return 0; // to ask for the sink would be to wait
}

void triad(TensorList a, TensorList b, TensorList c, double scale) {
  const OnDevice device(a[0]);
  const RawList to(a), left(b), right(c);
  Columns columns;
  for (const RawList* list : {&to, &left, &right}) columns.add(*list);
  columns.for_each_table(sizes_of(a), chunks_of, every_tensor, [&](const Table& table) {
    device.launch("triad_", triad_kernel, table.units, table, float(scale));
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext_bench, UNLEARN_CUDA_KEY, m) {
  m.impl("same_traffic_", TORCH_BOX(&unlearn::same_traffic));
  m.impl("triad_", TORCH_BOX(&unlearn::triad));
}
