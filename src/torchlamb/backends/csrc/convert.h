// Between float32 and the 16-bit floats, in loops that the compiler turns into vector instructions.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

inline uint32_t bits_of(float x) {
  uint32_t raw;
  std::memcpy(&raw, &x, sizeof raw);
  return raw;
}

inline float float_of(uint32_t raw) {
  float x;
  std::memcpy(&x, &raw, sizeof x);
  return x;
}

// bfloat16: the upper half of a float32.

inline float from_bfloat16(uint16_t raw) { return float_of(uint32_t(raw) << 16); }

inline uint16_t to_bfloat16(float x) {
  uint32_t raw = bits_of(x);
  uint32_t nearest = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16;  // ties to even
  bool is_nan = (raw & 0x7FFFFFFF) > 0x7F800000;
  return uint16_t(is_nan ? 0x7FC0 : nearest);
}

// See rounding.to_bfloat16. `noise` has 16 random bits.
inline uint16_t to_bfloat16_stochastically(float x, uint32_t noise) {
  uint32_t raw = bits_of(x);
  bool is_finite = (raw & 0x7F800000) != 0x7F800000;
  return uint16_t(is_finite ? (raw + noise) >> 16 : to_bfloat16(x));
}

// float16: in hardware where there is some, else from its definition.

inline float from_float16(uint16_t raw) {
#if defined(__aarch64__)
  _Float16 x;
  std::memcpy(&x, &raw, sizeof x);
  return float(x);
#else
  uint32_t sign = uint32_t(raw & 0x8000) << 16, exponent = (raw >> 10) & 31, mantissa = raw & 0x3FF;
  if (exponent == 31) return float_of(sign | 0x7F800000 | (mantissa ? 0x400000 : 0) | mantissa << 13);
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 0x1p-24f));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

inline uint16_t to_float16(float x) {
#if defined(__aarch64__)
  _Float16 half = _Float16(x);
  uint16_t raw;
  std::memcpy(&raw, &half, sizeof raw);
  return raw;
#else
  uint32_t raw = bits_of(x), sign = (raw >> 16) & 0x8000, size = raw & 0x7FFFFFFF;
  if (size > 0x7F800000) return uint16_t(sign | 0x7E00 | ((size >> 13) & 0x3FF));  // NaN
  if (size >= 0x477FF000) return uint16_t(sign | 0x7C00);                          // rounds to infinity
  if (size < 0x38800000) {
    // Subnormal: units of 2^-24. Adding 2^-1 makes float32 round to them, to nearest and ties to even.
    return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
  }
  return uint16_t(sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13));
#endif
}

// Arrays.

inline void from_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
}

inline void to_bfloat16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
}

inline void to_bfloat16_stochastically(const float* from, uint16_t* to, const uint32_t* bits, int shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16_stochastically(from[i], (bits[i] >> shift) & 0xFFFF);
}

inline void from_float16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) to[i] = from_float16(from[i]);
}

inline void to_float16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) to[i] = to_float16(from[i]);
}

}  // namespace
