// Eight weights in registers: 16-byte accesses where a column is aligned, single ones elsewhere and at a tensor's end.
//
// Loading and widening are apart, so that the loads of all columns are under way before the first number is needed.
// Everything is read and written once a step: the streaming hints keep it from driving other data out of the cache.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../math/bits.h"
#include "../math/rounding.h"
#include "table.cuh"

namespace unlearn {

// Eight numbers as they are stored, or widened already where that takes no more room.
template <typename T>
struct Octet;
template <>
struct Octet<float> {
  std::uint32_t word[8]; // two half-width numbers share one of the first four
};
template <>
struct Octet<double> {
  double value[8];
};

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

__device__ __forceinline__ void load_quad(const void* from, std::uint32_t* to) {
  const uint4 quad = __ldcs(static_cast<const uint4*>(from));
  to[0] = quad.x;
  to[1] = quad.y;
  to[2] = quad.z;
  to[3] = quad.w;
}

__device__ __forceinline__ void store_quad(void* to, const std::uint32_t* from) {
  __stcs(static_cast<uint4*>(to), make_uint4(from[0], from[1], from[2], from[3]));
}

__device__ __forceinline__ float narrow_to_float(std::uint16_t bits, Storage storage) {
  return storage == Storage::bf16 ? bfloat16_to_float(bits) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ std::uint16_t round_to_half(float value, Storage storage) {
  return storage == Storage::bf16 ? float_to_bfloat16(value) : __half_as_ushort(__float2half_rn(value));
}

// Loads the first `n` of N float32 numbers from `begin`, a multiple of N; the rest are zero.
template <int N>
__device__ __forceinline__ void load_floats(std::uint32_t* words, const char* base, std::int64_t begin, int n) {
  const float* from = reinterpret_cast<const float*>(base) + begin;
  if (n == N && is_aligned(base)) {
#pragma unroll
    for (int k = 0; k < N; k += 4) load_quad(from + k, words + k);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) words[k] = k < n ? to_bits(from[k]) : 0u;
  }
}

// The same for half-width numbers, two to a word.
template <int N>
__device__ __forceinline__ void load_halves(std::uint32_t* words, const char* base, std::int64_t begin, int n) {
  const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(base) + begin;
  if (n == N && is_aligned(base)) {
    if constexpr (N == 4) {
      const uint2 pair = __ldcs(reinterpret_cast<const uint2*>(from));
      words[0] = pair.x;
      words[1] = pair.y;
    } else {
      load_quad(from, words);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      const std::uint32_t low = 2 * k < n ? from[2 * k] : 0u, high = 2 * k + 1 < n ? from[2 * k + 1] : 0u;
      words[k] = low | high << 16;
    }
  }
}

// The bits of one of them.
__device__ __forceinline__ std::uint16_t half_bits(const std::uint32_t* words, int k) {
  return std::uint16_t(words[k / 2] >> (16 * (k % 2)));
}

// Loads the first `n` of eight weights from `begin`, a multiple of 8; the rest are zero.
__device__ __forceinline__ void load_octet(
    Octet<float>& octet, Storage storage, const char* base, std::int64_t begin, int n) {
  if (storage == Storage::f32) {
    load_floats<kOctet>(octet.word, base, begin, n);
  } else if (storage == Storage::f64) {
    const double* from = reinterpret_cast<const double*>(base) + begin;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.word[k] = k < n ? to_bits(float(from[k])) : 0u;
  } else {
    load_halves<kOctet>(octet.word, base, begin, n);
  }
}

__device__ __forceinline__ void load_octet(
    Octet<double>& octet, Storage storage, const char* base, std::int64_t begin, int n) {
  if (storage == Storage::f64) {
    const double* from = reinterpret_cast<const double*>(base) + begin;
    if (n == kOctet && is_aligned(base)) {
#pragma unroll
      for (int k = 0; k < kOctet; k += 2) {
        const double2 pair = __ldcs(reinterpret_cast<const double2*>(from + k));
        octet.value[k] = pair.x;
        octet.value[k + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) octet.value[k] = k < n ? from[k] : 0.0;
    }
  } else if (storage == Storage::f32) {
    const float* from = reinterpret_cast<const float*>(base) + begin;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.value[k] = k < n ? from[k] : 0.0;
  } else {
    const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(base) + begin;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.value[k] = k < n ? narrow_to_float(from[k], storage) : 0.0;
  }
}

__device__ __forceinline__ void widen(const Octet<float>& octet, Storage storage, float* values) {
  if (storage == Storage::bf16 || storage == Storage::f16) {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) values[k] = narrow_to_float(half_bits(octet.word, k), storage);
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) values[k] = from_bits<float>(octet.word[k]);
  }
}

__device__ __forceinline__ void widen(const Octet<double>& octet, Storage, double* values) {
#pragma unroll
  for (int k = 0; k < kOctet; ++k) values[k] = octet.value[k];
}

// Stores the first `n` of eight numbers of the opmath type.
__device__ __forceinline__ void store_octet(char* base, std::int64_t begin, int n, const float* values) {
  float* to = reinterpret_cast<float*>(base) + begin;
  if (n == kOctet && is_aligned(base)) {
    std::uint32_t word[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) word[k] = to_bits(values[k]);
    store_quad(to, word);
    store_quad(to + 4, word + 4);
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (k < n) to[k] = values[k];
    }
  }
}

__device__ __forceinline__ void store_octet(char* base, std::int64_t begin, int n, const double* values) {
  double* to = reinterpret_cast<double*>(base) + begin;
  if (n == kOctet && is_aligned(base)) {
#pragma unroll
    for (int k = 0; k < kOctet; k += 2) {
      __stcs(reinterpret_cast<double2*>(to + k), make_double2(values[k], values[k + 1]));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (k < n) to[k] = values[k];
    }
  }
}

// Stores the first `n` of eight half-width numbers.
__device__ __forceinline__ void store_halves(char* base, std::int64_t begin, int n, const std::uint16_t* bits) {
  std::uint16_t* to = reinterpret_cast<std::uint16_t*>(base) + begin;
  if (n == kOctet && is_aligned(base)) {
    std::uint32_t word[kOctet / 2];
#pragma unroll
    for (int k = 0; k < kOctet / 2; ++k) word[k] = std::uint32_t(bits[2 * k]) | std::uint32_t(bits[2 * k + 1]) << 16;
    store_quad(to, word);
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (k < n) to[k] = bits[k];
    }
  }
}

// The mask's byte for the octet at `begin`.
__device__ __forceinline__ std::uint32_t load_mask(const char* bits, std::int64_t begin) {
  return reinterpret_cast<const std::uint8_t*>(bits)[begin / kOctet];
}

// Writes the mask's byte for the octet at `begin` of a tensor of `size` weights. The last word's bytes beyond the
// tensor's end have no thread of their own: the last octet's clears them.
__device__ __forceinline__ void store_mask(void* bits, std::int64_t begin, std::int64_t size, std::uint32_t byte) {
  std::uint8_t* bytes = static_cast<std::uint8_t*>(bits);
  bytes[begin / kOctet] = std::uint8_t(byte);
  if (begin + kOctet >= size) {
    for (std::int64_t after = begin / kOctet + 1; after % 4 != 0; ++after) bytes[after] = 0;
  }
}

// Calls body(first weight, number of weights) for each of a thread's octets in its block's chunk.
template <typename Body>
__device__ __forceinline__ void for_each_octet(const Table& table, int tensor, const Body& body) {
  const std::int64_t chunk = std::int64_t(blockIdx.x - table.first_unit(tensor)) * kChunk;
  const std::int64_t size = table.size(tensor);
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const std::int64_t begin = chunk + (std::int64_t(pass) * kThreads + threadIdx.x) * kOctet;
    if (begin < size) body(begin, size - begin < kOctet ? int(size - begin) : kOctet);
  }
}

} // namespace unlearn
