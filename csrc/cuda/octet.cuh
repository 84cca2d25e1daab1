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

__device__ __forceinline__ float narrow_to_float(std::uint16_t bits, Code code) {
  return code == Code::bfloat16 ? bfloat16_to_float(bits) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ std::uint16_t round_to_half(float value, Code code) {
  return code == Code::bfloat16 ? float_to_bfloat16(value) : __half_as_ushort(__float2half_rn(value));
}

// Loads `n` of the weights from `first`, a multiple of 8; the rest are zero.
__device__ __forceinline__ void load_octet(
    Octet<float>& octet, Code code, const char* base, std::int64_t first, int n) {
  const bool vector = n == kOctet && is_aligned(base);
  if (code == Code::single) {
    const float* from = reinterpret_cast<const float*>(base) + first;
    if (vector) {
      load_quad(from, octet.word);
      load_quad(from + 4, octet.word + 4);
    } else {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) octet.word[k] = k < n ? to_bits(from[k]) : 0u;
    }
  } else if (code == Code::wide) {
    const double* from = reinterpret_cast<const double*>(base) + first;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.word[k] = k < n ? to_bits(float(from[k])) : 0u;
  } else {
    const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(base) + first;
    if (vector) {
      load_quad(from, octet.word);
    } else {
#pragma unroll
      for (int k = 0; k < kOctet / 2; ++k) {
        const std::uint32_t low = 2 * k < n ? from[2 * k] : 0u, high = 2 * k + 1 < n ? from[2 * k + 1] : 0u;
        octet.word[k] = low | high << 16;
      }
    }
  }
}

__device__ __forceinline__ void load_octet(
    Octet<double>& octet, Code code, const char* base, std::int64_t first, int n) {
  if (code == Code::wide) {
    const double* from = reinterpret_cast<const double*>(base) + first;
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
  } else if (code == Code::single) {
    const float* from = reinterpret_cast<const float*>(base) + first;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.value[k] = k < n ? from[k] : 0.0;
  } else {
    const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(base) + first;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.value[k] = k < n ? narrow_to_float(from[k], code) : 0.0;
  }
}

// The stored bits of a half-width number.
__device__ __forceinline__ std::uint16_t half_bits(const Octet<float>& octet, int k) {
  return std::uint16_t(octet.word[k / 2] >> (16 * (k % 2)));
}

__device__ __forceinline__ void widen(const Octet<float>& octet, Code code, float* values) {
  if (code == Code::bfloat16 || code == Code::half) {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) values[k] = narrow_to_float(half_bits(octet, k), code);
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) values[k] = from_bits<float>(octet.word[k]);
  }
}

__device__ __forceinline__ void widen(const Octet<double>& octet, Code, double* values) {
#pragma unroll
  for (int k = 0; k < kOctet; ++k) values[k] = octet.value[k];
}

// Stores the first `n` of eight numbers of the opmath type.
__device__ __forceinline__ void store_octet(char* base, std::int64_t first, int n, const float* values) {
  float* to = reinterpret_cast<float*>(base) + first;
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

__device__ __forceinline__ void store_octet(char* base, std::int64_t first, int n, const double* values) {
  double* to = reinterpret_cast<double*>(base) + first;
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
__device__ __forceinline__ void store_halves(char* base, std::int64_t first, int n, const std::uint16_t* bits) {
  std::uint16_t* to = reinterpret_cast<std::uint16_t*>(base) + first;
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

// The mask's byte for the octet at `first`.
__device__ __forceinline__ std::uint32_t load_mask(const char* bits, std::int64_t first) {
  return reinterpret_cast<const std::uint8_t*>(bits)[first / kOctet];
}

// Calls body(first weight, number of weights) for each of a thread's octets in its block's chunk.
template <typename Body>
__device__ __forceinline__ void for_each_octet(const Table& table, int tensor, const Body& body) {
  const std::int64_t begin = std::int64_t(blockIdx.x - table.first_unit(tensor)) * kChunk;
  const std::int64_t size = table.size(tensor);
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const std::int64_t first = begin + (std::int64_t(pass) * kThreads + threadIdx.x) * kOctet;
    if (first < size) body(first, size - first < kOctet ? int(size - first) : kOctet);
  }
}

} // namespace unlearn
