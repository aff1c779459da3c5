// The arithmetic on one chunk of a row, built once for each instruction set.

#pragma once

#include "abi.h"

// Elements that one thread works through at a time, and over which sums of squares are kept apart. Part of the result: another
// size adds in another order.
constexpr int64_t CHUNK = 32 * 1024;

struct Chunk {
  int64_t row, begin, end;
};

// The numbers of a step in the precision of the arithmetic.
struct Scalars {
  float lr, beta1, beta2;
  float grad_weight, grad_sq_weight;  // 1 - beta1 and 1 - beta2, from float64
  float weight_decay, grad_factor;
  float phi_low, phi_high, ratio_low, ratio_high;
  int64_t flags;
};

// What differs from row to row beside its memory.
struct RowNumbers {
  float eps, k;         // rule.bias_factors
  uint32_t key1, key2;  // precision.keys
};

struct Sums {
  double of[SUMS];
};

struct Kernels {
  double (*grad_squares)(const Rows&, const Chunk&);
  Sums (*accumulate)(const Rows&, const Scalars&, const RowNumbers&, const Chunk&);  // moments in place
  void (*apply)(const Rows&, const Scalars&, const RowNumbers&, const Chunk&, float size);  // parameters less size * update
};

extern const Kernels kernels_baseline;
#ifdef TORCHLAMB_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Map 32 bits to 32 bits: see precision._mix.
static inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21F0AAAD;
  x ^= x >> 15;
  x *= 0xD35A2D97;
  return x ^ (x >> 15);
}
