// Conversions between the dtypes of weights and gradients and the opmath type.
#include "strips.h"

#include <torch/headeronly/util/Half.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../math/rounding.h"

namespace unlearn {
namespace {

// The float16 conversions use the wide instructions where the processor has them: GCC does not vectorise them.
void half_to_float(const std::uint16_t* from, float* to, int n) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(c10::Half(from[i], c10::Half::from_bits()));
}

void half_to_float(const std::uint16_t* from, double* to, int n) {
  float narrow[kStrip];
  half_to_float(from, narrow, n);
  std::copy(narrow, narrow + n, to);
}

} // namespace

void float_to_half(const float* from, std::uint16_t* to, int n) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) to[i] = c10::Half(from[i]).x;
}

template <typename T>
void convert_strip(const RawList& list, size_t tensor, std::int64_t begin, int n, T* buffer) {
  switch (list.dtype[tensor]) {
    case ScalarType::Double: {
      const double* from = list.at<double>(tensor, begin);
      for (int i = 0; i < n; ++i) buffer[i] = T(from[i]);
      break;
    }
    case ScalarType::Float: {
      const float* from = list.at<float>(tensor, begin);
      for (int i = 0; i < n; ++i) buffer[i] = T(from[i]);
      break;
    }
    case ScalarType::BFloat16: {
      const std::uint16_t* from = list.at<std::uint16_t>(tensor, begin);
      for (int i = 0; i < n; ++i) buffer[i] = T(bfloat16_to_float(from[i]));
      break;
    }
    default: // Half; the checks admit no other dtype
      half_to_float(list.at<std::uint16_t>(tensor, begin), buffer, n);
  }
}

template <typename T>
void store_strip(const RawList& list, size_t tensor, std::int64_t begin, int n, const T* values) {
  switch (list.dtype[tensor]) {
    case ScalarType::Double:
      std::copy(values, values + n, list.at<double>(tensor, begin));
      break;
    case ScalarType::Float: {
      float* to = list.at<float>(tensor, begin);
      for (int i = 0; i < n; ++i) to[i] = float(values[i]);
      break;
    }
    case ScalarType::BFloat16: {
      std::uint16_t* to = list.at<std::uint16_t>(tensor, begin);
      for (int i = 0; i < n; ++i) to[i] = float_to_bfloat16(float(values[i]));
      break;
    }
    default: { // Half
      float narrow[kStrip];
      for (int i = 0; i < n; ++i) narrow[i] = float(values[i]);
      float_to_half(narrow, list.at<std::uint16_t>(tensor, begin), n);
    }
  }
}

template void store_strip<float>(const RawList&, size_t, std::int64_t, int, const float*);
template void store_strip<double>(const RawList&, size_t, std::int64_t, int, const double*);
template void convert_strip<float>(const RawList&, size_t, std::int64_t, int, float*);
template void convert_strip<double>(const RawList&, size_t, std::int64_t, int, double*);

} // namespace unlearn
