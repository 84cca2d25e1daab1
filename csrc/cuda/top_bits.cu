// top_bits on CUDA: the radix search of math/radix.h, its state on the device, so that the host waits for nothing.
//
// The list is cut into at most kPieces contiguous pieces a launch, one for each thread block, however long it is. One
// kernel makes every pass, so that the scores are the same bits in each: written twice, the compiler might fuse their
// multiplications and additions differently.
#include "../operators/top_bits.h"

#include "../math/radix.h"

#include "launch.cuh"
#include "octet.cuh"

namespace unlearn {
namespace {

constexpr int kPieces = 1024;

enum class Pass : int { count_digits, count_ties, write };

// Device memory of one call. `ties` has one entry for each piece; after the search it says how many of its ties a
// piece has, and `left` how many of them it keeps.
template <typename Key>
struct TopState {
  RadixSearch<Key>* search;
  unsigned long long* totals; // kBins
  unsigned long long *ties, *left;
  unsigned long long* kept; // for each tensor of the list
};

template <typename T>
__device__ __forceinline__ void score_octet(Score score, const T* values, const T* other, const TopOptions& o, T* to) {
  const T sf = T(o.forget_scale), sr = T(o.retain_scale), eps = T(o.eps);
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    to[k] = score == Score::value   ? score_of<Score::value>(values[k], other[k], sf, sr, eps)
        : score == Score::magnitude ? score_of<Score::magnitude>(values[k], other[k], sf, sr, eps)
        : score == Score::product   ? score_of<Score::product>(values[k], other[k], sf, sr, eps)
                                    : score_of<Score::ratio>(values[k], other[k], sf, sr, eps);
  }
}

// The scores of an octet in the opmath type of its tensor.
template <typename T>
__device__ __forceinline__ void load_scores(
    const Table& table, const TopOptions& o, int t, std::int64_t i, int n, T* scores) {
  Octet<T> stored, stored_other;
  T values[kOctet], other[kOctet] = {};
  load_octet(stored, table.storage(0, t), table.pointer(0, t), i, n);
  if (takes_two(o.score)) load_octet(stored_other, table.storage(1, t), table.pointer(1, t), i, n);
  widen(stored, table.storage(0, t), values);
  if (takes_two(o.score)) widen(stored_other, table.storage(1, t), other);
  score_octet(o.score, values, other, o, scores);
}

// The keys of an octet's scores. T is the widest opmath type in the list; widening a score keeps the order.
template <typename T>
__device__ __forceinline__ void load_keys(
    const Table& table, const TopOptions& o, int t, std::int64_t i, int n, bits_t<T>* keys) {
  if constexpr (sizeof(T) == 8) {
    const bool f64 = table.storage(0, t) == Storage::f64 || (takes_two(o.score) && table.storage(1, t) == Storage::f64);
    double scores[kOctet];
    if (f64) {
      load_scores(table, o, t, i, n, scores);
    } else {
      float narrow[kOctet];
      load_scores(table, o, t, i, n, narrow);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) scores[k] = double(narrow[k]);
    }
#pragma unroll
    for (int k = 0; k < kOctet; ++k) keys[k] = order_key(scores[k]);
  } else {
    float scores[kOctet];
    load_scores(table, o, t, i, n, scores);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) keys[k] = order_key(scores[k]);
  }
}

// How many of the block's ties stand before those of this thread, which has `ties`. Every thread must take part.
__device__ __forceinline__ unsigned ties_before(unsigned ties, unsigned* room) {
  unsigned before = 0;
  room[threadIdx.x] = ties;
  for (int stride = 1; stride < kThreads; stride *= 2) {
    __syncthreads();
    const unsigned lower = int(threadIdx.x) >= stride ? room[threadIdx.x - stride] : 0u;
    __syncthreads();
    room[threadIdx.x] += lower;
    before += lower;
  }
  return before;
}

// Keeps those of this thread's ties that are among the block's first `left`, and takes all of the block's from `left`.
// Every thread must take part.
__device__ __forceinline__ std::uint32_t first_ties(std::uint32_t ties, unsigned long long& left, unsigned* room) {
  const unsigned before = ties_before(unsigned(count_word(ties)), room);
  ties = before < left ? lowest_bits(ties, std::int64_t(left - before)) : 0u;
  __syncthreads();
  const unsigned all = room[kThreads - 1];
  left = left > all ? left - all : 0;
  __syncthreads();
  return ties;
}

// Which of an octet's first n keys tie with what the search has found, and which are above it.
template <typename Key>
__device__ __forceinline__ void compare(
    const RadixSearch<Key>& search, const Key* keys, int n, std::uint32_t& ties, std::uint32_t& above) {
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    ties |= std::uint32_t(search.ties(keys[k])) << k;
    above |= std::uint32_t(search.is_above(keys[k])) << k;
  }
  ties &= valid_bits(n);
  above &= valid_bits(n);
}

// Adds what the block's threads have kept to `total`. Integers: any order gives the same sum.
__device__ __forceinline__ void add_kept(unsigned thread_kept, unsigned* block_sum, unsigned long long* total) {
  atomicAdd(block_sum, thread_kept);
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(total, static_cast<unsigned long long>(*block_sum));
    *block_sum = 0;
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads) top_kernel(
    const __grid_constant__ Table table, const __grid_constant__ TopOptions options, Pass pass, int first_piece,
    TopState<bits_t<T>> state) {
  __shared__ unsigned room[kBins > kThreads ? kBins : kThreads];
  __shared__ unsigned block_sum;
  const RadixSearch<bits_t<T>> search = *state.search;
  if (pass == Pass::count_digits && search.ended) return;
  const int piece = first_piece + int(blockIdx.x);
  const std::int64_t begin = std::int64_t(table.units) * blockIdx.x / gridDim.x;
  const std::int64_t end = std::int64_t(table.units) * (blockIdx.x + 1) / gridDim.x;
  for (int digit = threadIdx.x; pass == Pass::count_digits && digit < kBins; digit += kThreads) room[digit] = 0;
  if (threadIdx.x == 0) block_sum = 0;
  __syncthreads();

  const unsigned long long piece_ties = pass == Pass::write ? state.ties[piece] : 0;
  unsigned long long left = pass == Pass::write ? state.left[piece] : 0;
  unsigned thread_ties = 0;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const int t = table.tensor_of(std::uint32_t(chunk));
    const std::int64_t size = table.size(t), start = (chunk - table.first_unit(t)) * kChunk;
    unsigned thread_kept = 0;
#pragma unroll 1
    for (int part = 0; part < kPasses; ++part) {
      const std::int64_t i = start + (std::int64_t(part) * kThreads + threadIdx.x) * kOctet;
      const int n = i >= size ? 0 : size - i < kOctet ? int(size - i) : kOctet;
      bits_t<T> keys[kOctet];
      std::uint32_t ties = 0, above = 0;
      if (n > 0) {
        load_keys<T>(table, options, t, i, n, keys);
        compare(search, keys, n, ties, above);
      }
      if (pass == Pass::count_digits) {
#pragma unroll
        for (int k = 0; k < kOctet; ++k) {
          if ((ties >> k) & 1u) atomicAdd(room + search.digit_of(keys[k]), 1u);
        }
      } else if (pass == Pass::count_ties) {
        thread_ties += unsigned(count_word(ties));
      } else {
        // Only the piece in which the kept ties end must know their order.
        if (left == 0) {
          ties = 0;
        } else if (state.left[piece] != piece_ties) {
          ties = first_ties(ties, left, room);
        }
        if (n > 0) {
          store_mask(table.pointer(takes_two(options.score) ? 2 : 1, t), i, size, above | ties);
          thread_kept += unsigned(count_word(above | ties));
        }
      }
    }
    if (pass == Pass::write) add_kept(thread_kept, &block_sum, state.kept + table.index(t));
  }

  if (pass == Pass::count_ties) atomicAdd(&block_sum, thread_ties);
  __syncthreads();
  if (pass == Pass::count_ties && threadIdx.x == 0) state.ties[piece] = block_sum;
  if (pass == Pass::count_digits) {
    for (int digit = threadIdx.x; digit < kBins; digit += kThreads) {
      if (room[digit]) atomicAdd(state.totals + digit, static_cast<unsigned long long>(room[digit]));
    }
  }
}

template <typename Key>
__global__ void begin_kernel(std::int64_t k, TopState<Key> state) {
  if (threadIdx.x == 0) *state.search = RadixSearch<Key>(k);
  for (int digit = threadIdx.x; digit < kBins; digit += kThreads) state.totals[digit] = 0;
}

template <typename Key>
__global__ void __launch_bounds__(kThreads) advance_kernel(TopState<Key> state) {
  __shared__ std::int64_t totals[kBins];
  if (state.search->ended) return;
  for (int digit = threadIdx.x; digit < kBins; digit += kThreads) {
    totals[digit] = std::int64_t(state.totals[digit]);
    state.totals[digit] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) state.search->advance(totals);
}

// How many of its ties each piece keeps, the earlier pieces first.
template <typename Key>
__global__ void __launch_bounds__(kThreads) share_kernel(int pieces, TopState<Key> state) {
  __shared__ unsigned long long ties[kPieces];
  __shared__ unsigned long long rest;
  if (threadIdx.x == 0) rest = static_cast<unsigned long long>(state.search->left);
  for (int begin = 0; begin < pieces; begin += kPieces) {
    const int n = pieces - begin < kPieces ? pieces - begin : kPieces;
    __syncthreads();
    for (int p = threadIdx.x; p < n; p += kThreads) ties[p] = state.ties[begin + p];
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int p = 0; p < n; ++p) {
        ties[p] = ties[p] < rest ? ties[p] : rest;
        rest -= ties[p];
      }
    }
    __syncthreads();
    for (int p = threadIdx.x; p < n; p += kThreads) state.left[begin + p] = ties[p];
  }
}

template <typename T>
void select_top(
    const OnDevice& device, const Columns& columns, const std::vector<std::int64_t>& sizes, const TopOptions& options,
    const Tensor& counts) {
  using Key = bits_t<T>;
  const char* op = "top_bits";
  const auto pieces_of = [](const Table& table) { return table.units < kPieces ? int(table.units) : kPieces; };
  int pieces = 0;
  columns.for_each_table(sizes, chunks_of, every_tensor, [&](const Table& table) { pieces += pieces_of(table); });

  constexpr std::int64_t kSearchWords = (sizeof(RadixSearch<Key>) + 7) / 8;
  const Tensor memory = empty_flat(counts, kSearchWords + kBins + 2 * pieces, ScalarType::Long);
  auto* words = static_cast<unsigned long long*>(memory.data_ptr());
  TopState<Key> state{};
  state.search = reinterpret_cast<RadixSearch<Key>*>(words);
  state.totals = words + kSearchWords;
  state.ties = state.totals + kBins;
  state.left = state.ties + pieces;
  state.kept = static_cast<unsigned long long*>(counts.data_ptr());

  const auto run = [&](Pass pass) {
    int begin = 0;
    columns.for_each_table(sizes, chunks_of, every_tensor, [&](const Table& table) {
      device.launch(op, top_kernel<T>, std::uint32_t(pieces_of(table)), table, options, pass, begin, state);
      begin += pieces_of(table);
    });
  };
  device.launch(op, begin_kernel<Key>, 1, options.k, state);
  constexpr int kKeyBits = 8 * int(sizeof(Key));
  for (int digit = 0; digit < (kKeyBits + kDigitBits - 1) / kDigitBits; ++digit) {
    run(Pass::count_digits);
    device.launch(op, advance_kernel<Key>, 1, state);
  }
  run(Pass::count_ties);
  device.launch(op, share_kernel<Key>, 1, pieces, state);
  run(Pass::write);
}

void write_top_bits(
    const TensorList& scores, const TensorList& other, const TopOptions& options, const TensorList& bits,
    const Tensor& counts) {
  const OnDevice device(scores[0]);
  device.zero("top_bits", counts);
  if (options.k == 0) {
    for (const Tensor& words : bits) device.zero("top_bits", words);
    return;
  }
  const RawList values(scores), others(other), words(bits);
  Columns columns;
  columns.add(values, /*mixed=*/true);
  columns.add(others, /*mixed=*/true);
  columns.add(words);
  bool f64 = false;
  for (size_t t = 0; t < scores.size(); ++t) {
    f64 = f64 || values.dtype[t] == ScalarType::Double || (!others.empty() && others.dtype[t] == ScalarType::Double);
  }
  if (f64) {
    select_top<double>(device, columns, sizes_of(scores), options, counts);
  } else {
    select_top<float>(device, columns, sizes_of(scores), options, counts);
  }
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("top_bits", TORCH_BOX(&unlearn::top_bits<&unlearn::write_top_bits>));
}
