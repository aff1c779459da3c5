// What Python and the kernels agree on. Plain C: the library knows neither Python nor torch, and serves every version of them.
// Change TORCHLAMB_ABI with everything here that changes; cpu.py compares it before the first call.

#pragma once

#include <cstdint>

#define TORCHLAMB_ABI 2
#define TORCHLAMB_EXPORT __attribute__((visibility("default")))

extern "C" {

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

enum Flags : int32_t {
  BIAS_CORRECTION = 1,
  GRAD_AVERAGING = 2,
  LAYER_ADAPTATION = 4,
  ROUND_PARAMS_STOCHASTICALLY = 8,
  GUARDED = 16,  // parameters whose norms are not finite stay as they are
};

// What is added up of each row: see torchlamb.rule.SUMS.
enum Sum : int32_t { PARAM_SQ = 0, UPDATE_SQ = 1, SUMS = 2 };

// What all rows step with: see torchlamb.rule.Scalars.
struct Options {
  double beta1, beta2, eps, weight_decay;
  double phi_low, phi_high, ratio_low, ratio_high;  // 0 and infinity where there are no bounds
  int64_t flags;
  const double* lr;
  const float* grad_factor;
  const bool* skip;  // null: never
};

// Element e of a row has the index first + starts[e / length] + stride * (e % length) in the whole tensor: see place.Runs.
struct Runs {
  int64_t first;
  const int64_t* starts;  // null where all is one run
  int64_t length, stride;
};

// Row i: `sizes[i]` elements that lie alike in all its tensors. No two tensors overlap. The columns of torchlamb.bucket, in their
// order; after them the dtypes of those that have none of their own.
struct Rows {
  int64_t count;
  const int64_t* sizes;
  void* const* params;
  const void* const* grads;
  void* const* exp_avgs;
  void* const* exp_avg_sqs;
  float* const* masters;       // null where there are none
  float* const* steps;         // of the parameter; rows of one parameter follow each other and share it
  const int64_t* const* seeds;  // null where nothing is rounded stochastically
  const Runs* runs;             // null where seeds is
  int64_t param_dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype;
};

// torch's own threads: torch_parallel_for of torch/csrc/stable/c/shim.h. Null: no threads.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

TORCHLAMB_EXPORT int32_t torchlamb_abi();

// Use the highest instruction set that the machine has and that is not above `highest`: "baseline", "avx2" or "avx512". Returns
// its name.
TORCHLAMB_EXPORT const char* torchlamb_set_isa(const char* highest);

// Accumulate and step count the step first. Each returns 0, or what parallel_for returned. sums: SUMS floats for each row; out:
// one, the sum of squares of its gradient.
TORCHLAMB_EXPORT int32_t torchlamb_grad_sq_norms(const Rows*, const Options*, ParallelFor, float* out);
TORCHLAMB_EXPORT int32_t torchlamb_accumulate(const Rows*, const Options*, ParallelFor, float* sums);
TORCHLAMB_EXPORT int32_t torchlamb_apply(const Rows*, const Options*, ParallelFor, float* sums);
TORCHLAMB_EXPORT int32_t torchlamb_step(const Rows*, const Options*, ParallelFor, float* sums);
}
