// LANES floats as one value, in the registers that the instruction set has. Its loops have constant bounds and vanish.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Sums run in this many lanes on every machine. Part of the result: another number adds in another order.
constexpr int64_t LANES = 32;

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
constexpr int64_t REGISTERS = LANES / WIDTH;

typedef float Register __attribute__((vector_size(WIDTH * sizeof(float))));

inline Register square_root(Register x) {
#if defined(__AVX512F__)
  return (Register)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Register)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Register)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Register)vsqrtq_f32((float32x4_t)x);
#else
  for (int64_t i = 0; i < WIDTH; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline Register load(const float* from) {
  Register x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(Register x, float* to) { std::memcpy(to, &x, sizeof x); }

// A sum of squares in LANES lanes.
struct Squares {
  Register lanes[REGISTERS] = {};

  void add(int64_t i, Register x) { lanes[i] += x * x; }

  // The last elements of a row, fewer than LANES.
  void add_rest(const float* x, int64_t n) {
    float each[LANES];
    std::memcpy(each, lanes, sizeof each);
    for (int64_t i = 0; i < n; ++i) each[i] += x[i] * x[i];
    std::memcpy(lanes, each, sizeof each);
  }
};

// The sum over many tiles, whose own sums are float32.
struct Total {
  double lanes[LANES] = {};

  void add(const Squares& squares) {
    float each[LANES];
    std::memcpy(each, squares.lanes, sizeof each);
    for (int64_t i = 0; i < LANES; ++i) lanes[i] += each[i];
  }

  double sum() const {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

}  // namespace
