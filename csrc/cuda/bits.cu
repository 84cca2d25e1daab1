// pack_bits, unpack_bits and count_bits on CUDA.
#include "../operators/bits.h"

#include "launch.cuh"
#include "octet.cuh"

namespace unlearn {
namespace {

// Eight bools in one access where the address allows. A tensor's chunks begin at multiples of 4,096.
__device__ __forceinline__ bool is_aligned_for_bools(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 8 == 0;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Table table) {
  const int t = table.tensor_of(blockIdx.x);
  const std::uint8_t* masks = reinterpret_cast<const std::uint8_t*>(table.pointer(0, t));
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    std::uint32_t byte = 0;
    if (n == kOctet && is_aligned_for_bools(masks)) {
      const uint2 flags = __ldcs(reinterpret_cast<const uint2*>(masks + i));
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        byte |= std::uint32_t((((k < 4 ? flags.x : flags.y) >> (8 * (k % 4))) & 0xffu) != 0) << k;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) byte |= std::uint32_t(k < n && masks[i + k] != 0) << k;
    }
    store_mask(table.pointer(1, t), i, table.size(t), byte);
  });
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ Table table) {
  const int t = table.tensor_of(blockIdx.x);
  const char* bits = table.pointer(0, t);
  std::uint8_t* masks = reinterpret_cast<std::uint8_t*>(table.pointer(1, t));
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    const std::uint32_t byte = load_mask(bits, i);
    if (n == kOctet && is_aligned_for_bools(masks)) {
      std::uint32_t flags[2] = {0, 0};
#pragma unroll
      for (int k = 0; k < kOctet; ++k) flags[k / 4] |= ((byte >> k) & 1u) << (8 * (k % 4));
      __stcs(reinterpret_cast<uint2*>(masks + i), make_uint2(flags[0], flags[1]));
    } else {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        if (k < n) masks[i + k] = std::uint8_t((byte >> k) & 1u);
      }
    }
  });
}

// Here a "weight" of the table is a word.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Table table, unsigned long long* counts) {
  __shared__ unsigned int kept;
  if (threadIdx.x == 0) kept = 0;
  __syncthreads();
  const int t = table.tensor_of(blockIdx.x);
  const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(table.pointer(0, t));
  unsigned int thread_kept = 0;
  for_each_octet(table, t, [&](std::int64_t i, int n) {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) thread_kept += k < n ? unsigned(count_word(words[i + k])) : 0u;
  });
  atomicAdd(&kept, thread_kept);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(counts + table.index(t), static_cast<unsigned long long>(kept));
}

// One launch of a kernel with two columns, as long as the table holds the list; the masks give the sizes.
void run_on(
    const char* op, void (*kernel)(Table), const TensorList& masks, const TensorList& from, const TensorList& to) {
  const OnDevice device(masks[0]);
  const RawList inputs(from), outputs(to);
  Columns columns;
  columns.add(inputs);
  columns.add(outputs);
  columns.for_each_table(sizes_of(masks), chunks_of, every_tensor, [&](const Table& table) {
    device.launch(op, kernel, table.units, table);
  });
}

void pack_all(const TensorList& masks, const TensorList& bits) {
  run_on("pack_bits", pack_kernel, masks, masks, bits);
}

void unpack_all(const TensorList& bits, const TensorList& masks) {
  run_on("unpack_bits", unpack_kernel, masks, bits, masks);
}

void count_all(const TensorList& bits, const Tensor& counts) {
  const OnDevice device(bits[0]);
  device.zero("count_bits", counts);
  const RawList words(bits);
  Columns columns;
  columns.add(words);
  columns.for_each_table(sizes_of(bits), chunks_of, every_tensor, [&](const Table& table) {
    device.launch("count_bits", count_kernel, table.units, table, static_cast<unsigned long long*>(counts.data_ptr()));
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("pack_bits", TORCH_BOX(&unlearn::pack_bits<&unlearn::pack_all>));
  m.impl("unpack_bits", TORCH_BOX(&unlearn::unpack_bits<&unlearn::unpack_all>));
  m.impl("count_bits", TORCH_BOX(&unlearn::count_bits<&unlearn::count_all>));
}
