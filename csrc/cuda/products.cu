// gradient_products on CUDA, in the CPU's order: the same 32 lanes, the same blocks, the same tree. The sums are the
// same bits on both, as long as one launch takes the list; a longer one begins a block anew with every launch.
#include "../operators/gradient_products.h"

#include "../math/reduce.h"
#include "../operators/dispatch.h"
#include "../tensors/chunks.h"

#include "launch.cuh"
#include "octet.cuh"
#include "partials.cuh"

namespace unlearn {
namespace {

constexpr int kQuad = 4;                   // lanes of a thread
constexpr int kGroup = kWordBits / kQuad;  // threads that share a block of words
constexpr int kGroups = kThreads / kGroup; // blocks of words in a thread block
constexpr int kAhead = 4;                  // words whose loads are under way at once

// Four numbers as they are stored; float64 is read when it is needed.
struct Quad {
  std::uint32_t word[kQuad];
};

__device__ __forceinline__ void load(Quad& quad, Storage storage, const char* base, std::int64_t begin, int n) {
  if (storage == Storage::f32) {
    load_floats<kQuad>(quad.word, base, begin, n);
  } else if (storage != Storage::f64) {
    load_halves<kQuad>(quad.word, base, begin, n);
  }
}

__device__ __forceinline__ void widen(
    const Quad& quad, Storage storage, const char* base, std::int64_t begin, int n, double* values) {
  if (storage == Storage::f32) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) values[k] = double(from_bits<float>(quad.word[k]));
  } else if (storage == Storage::f64) {
    const double* from = reinterpret_cast<const double*>(base) + begin;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) values[k] = k < n ? from[k] : 0.0;
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) values[k] = double(narrow_to_float(half_bits(quad.word, k), storage));
  }
}

// A group of threads sums one block of words as csrc/cpu/products.cpp does: lane i of every word into sum i, then the
// 32 sums by the tree of combine_in_fixed_order.
template <bool forget, bool retain>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const __grid_constant__ Table table, bool has_bits, bool mask_retain, Products* partials) {
  __shared__ Products sums[kThreads];
  const int member = threadIdx.x % kGroup;
  const std::int64_t block = std::int64_t(blockIdx.x) * kGroups + threadIdx.x / kGroup;
  const std::int64_t end = (block + 1) * kBlockWords < table.units ? (block + 1) * kBlockWords : table.units;
  Products lanes[kQuad];
  std::int64_t word = block * kBlockWords;
  for (int t = word < end ? table.tensor_of(std::uint32_t(word)) : 0; word < end; ++t) {
    const std::int64_t size = table.size(t), first_word = table.first_unit(t);
    const std::int64_t stop = first_word + word_count(size) < end ? first_word + word_count(size) : end;
    const char* f_base = forget ? table.pointer(0, t) : nullptr;
    const char* r_base = retain ? table.pointer(forget ? 1 : 0, t) : nullptr;
    const char* bits = has_bits ? table.pointer(int(forget) + int(retain), t) : nullptr;
    const Storage f_storage = forget ? table.storage(0, t) : Storage::f32;
    const Storage r_storage = retain ? table.storage(forget ? 1 : 0, t) : Storage::f32;
    for (; word < stop; word += kAhead) {
      Quad f_quad[kAhead], r_quad[kAhead];
      std::uint32_t keep[kAhead];
      const std::int64_t begin = (word - first_word) * kWordBits + member * kQuad;
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (word + a < stop) {
          const std::int64_t i = begin + a * kWordBits;
          const int n = size - i < kQuad ? int(size - i) : kQuad; // not positive beyond the end
          if constexpr (forget) load(f_quad[a], f_storage, f_base, i, n);
          if constexpr (retain) load(r_quad[a], r_storage, r_base, i, n);
          keep[a] =
              bits ? reinterpret_cast<const std::uint32_t*>(bits)[word + a - first_word] >> (member * kQuad) : ~0u;
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (word + a < stop) {
          const std::int64_t i = begin + a * kWordBits;
          const int n = size - i < kQuad ? int(size - i) : kQuad;
          double f[kQuad], r[kQuad];
          if constexpr (forget) widen(f_quad[a], f_storage, f_base, i, n, f);
          if constexpr (retain) widen(r_quad[a], r_storage, r_base, i, n, r);
          const std::uint32_t keep_retain = mask_retain ? keep[a] : ~0u;
#pragma unroll
          for (int k = 0; k < kQuad; ++k) {
            add_products<forget, retain>(
                forget ? f[k] : 0.0, retain ? r[k] : 0.0, lane_mask<double>(keep[a], k),
                lane_mask<double>(keep_retain, k), lanes[k].forget_square, lanes[k].retain_square, lanes[k].cross,
                lanes[k].non_finite);
          }
        }
      }
    }
    word = stop;
  }
  combine_in_fixed_order(lanes, kQuad);
  sums[threadIdx.x] = lanes[0];
  __syncthreads();
  if (member == 0 && block * kBlockWords < table.units) {
    combine_in_fixed_order(sums + threadIdx.x, kGroup);
    partials[block] = sums[threadIdx.x];
  }
}

using ProductsKernel = void (*)(Table, bool, bool, Products*);

std::int64_t blocks_of(std::int64_t words) {
  return (words + kBlockWords - 1) / kBlockWords;
}

void sum_products(
    const TensorList& forget_grads, const TensorList& retain_grads, const TensorList& bits, bool mask_retain,
    const Tensor& result) {
  const OnDevice device(result);
  const bool forget = !forget_grads.empty(), retain = !retain_grads.empty();
  const RawList f(forget_grads), r(retain_grads), b(bits);
  Columns columns;
  columns.add(f, /*mixed=*/true);
  columns.add(r, /*mixed=*/true);
  columns.add(b);
  const auto sizes = sizes_of(forget ? forget_grads : retain_grads);
  std::int64_t count = 0;
  columns.for_each_table(sizes, word_count, every_tensor, [&](const Table& table) { count += blocks_of(table.units); });
  if (count == 0) {
    device.zero("gradient_products", result);
    return;
  }
  Partials<Products> partials(result, count);
  const auto kernel = with_gradients(forget, retain, [](auto forget, auto retain) -> ProductsKernel {
    return products_kernel<forget.value, retain.value>;
  });
  Products* next = partials.data();
  columns.for_each_table(sizes, word_count, every_tensor, [&](const Table& table) {
    const std::int64_t blocks = blocks_of(table.units);
    device.launch(
        "gradient_products", kernel, std::uint32_t((blocks + kGroups - 1) / kGroups), table, !bits.empty(), mask_retain,
        next);
    next += blocks;
  });
  partials.combine(device, "gradient_products", static_cast<Products*>(result.data_ptr()));
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("gradient_products", TORCH_BOX(&unlearn::gradient_products<&unlearn::sum_products>));
}
