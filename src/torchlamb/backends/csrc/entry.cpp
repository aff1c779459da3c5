// What Python calls: which instruction set, which chunks, on which threads.

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

// Elements of the rows that torchlamb_step takes together: with parameter, gradient and moments some MiB, which the last-level
// cache still has when they are walked back.
constexpr int64_t BATCH = 256 * 1024;

const Kernels* kernels = &kernels_baseline;

// Run body(i) for i in [0, count), in reverse order within each thread's share if asked to.
template <class Body>
int32_t for_each(int64_t count, bool backwards, ParallelFor parallel_for, const Body& body) {
  struct Context {
    const Body& body;
    bool backwards;
  } context{body, backwards};
  auto share = [](int64_t begin, int64_t end, void* pointer) {
    auto& context = *static_cast<Context*>(pointer);
    for (int64_t i = begin; i < end; ++i) context.body(context.backwards ? end - 1 - (i - begin) : i);
  };
  if (parallel_for == nullptr || count < 2) {
    share(0, count, &context);
    return 0;
  }
  return parallel_for(0, count, 1, share, &context);
}

// One call: the caller's arrays, and the numbers made of its options.
struct Step {
  const Rows& rows;
  Scalars s;
  std::vector<RowNumbers> numbers;
  ParallelFor parallel_for;
  bool skip;

  Step(const Rows& rows, const Options& o, ParallelFor parallel_for, bool count)
      : rows(rows), numbers(rows.count), parallel_for(parallel_for), skip(o.skip != nullptr && *o.skip) {
    for (int64_t row = 0; count && !skip && row < rows.count; ++row) {
      if (row == 0 || rows.steps[row] != rows.steps[row - 1]) *rows.steps[row] += 1;
    }
    s = {float(*o.lr),         float(o.beta1),        float(o.beta2),   float(1 - o.beta1), float(1 - o.beta2),
         float(o.weight_decay), *o.grad_factor,       float(o.phi_low), float(o.phi_high),  float(o.ratio_low),
         float(o.ratio_high),  o.flags};
    for (int64_t row = 0; row < rows.count; ++row) {
      double t = *rows.steps[row], eps = o.eps, k = 1;
      if (o.flags & BIAS_CORRECTION) {
        double root = std::sqrt(bias_correction(o.beta2, t));
        eps *= root, k = root / bias_correction(o.beta1, t);
      }
      numbers[row] = {float(eps), float(k), 0, 0};
      if (rows.seeds != nullptr) {
        uint64_t seed = uint64_t(*rows.seeds[row]);
        numbers[row].key1 = mix(uint32_t(seed) ^ uint32_t(int64_t(t)));
        numbers[row].key2 = mix(uint32_t(seed >> 32) ^ numbers[row].key1);
      }
    }
  }

  static double bias_correction(double beta, double t) { return -std::expm1(t * std::log(beta)); }

  std::vector<Chunk> chunks(int64_t first, int64_t last) const {
    std::vector<Chunk> found;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t begin = 0; begin < rows.sizes[row]; begin += CHUNK) {
        found.push_back({row, begin, rows.sizes[row] < begin + CHUNK ? rows.sizes[row] : begin + CHUNK});
      }
    }
    return found;
  }

  int32_t accumulate(const std::vector<Chunk>& chunks, float* sums) const {
    std::vector<Sums> found(chunks.size());
    int32_t error = for_each(chunks.size(), false, parallel_for, [&](int64_t i) {
      found[i] = kernels->accumulate(rows, s, numbers[chunks[i].row], chunks[i]);
    });
    for (size_t i = 0; i < chunks.size();) {  // in the order of the chunks, whichever thread took them
      int64_t row = chunks[i].row;
      Sums total{};
      for (; i < chunks.size() && chunks[i].row == row; ++i) {
        for (int sum = 0; sum < SUMS; ++sum) total.of[sum] += found[i].of[sum];
      }
      for (int sum = 0; sum < SUMS; ++sum) sums[SUMS * row + sum] = float(total.of[sum]);
    }
    return error;
  }

  int32_t apply(const std::vector<Chunk>& chunks, const float* sums) const {
    return for_each(chunks.size(), true, parallel_for, [&](int64_t i) {
      int64_t row = chunks[i].row;
      float param_sq = sums[SUMS * row + PARAM_SQ], update_sq = sums[SUMS * row + UPDATE_SQ];
      bool leaves = (s.flags & GUARDED) && !(std::isfinite(param_sq) && std::isfinite(update_sq));
      if (!leaves) kernels->apply(rows, s, numbers[row], chunks[i], size(param_sq, update_sq));
    });
  }

  // lr times the trust ratio: see rule.trust_ratio.
  float size(float param_sq, float update_sq) const {
    if (!(s.flags & LAYER_ADAPTATION) || param_sq == 0.0f || update_sq == 0.0f) return s.lr;
    auto clamp = [](float x, float low, float high) { return x < low ? low : x > high ? high : x; };
    float ratio = clamp(std::sqrt(param_sq), s.phi_low, s.phi_high) / std::sqrt(update_sq);
    return s.lr * clamp(ratio, s.ratio_low, s.ratio_high);
  }
};

}  // namespace

extern "C" {

int32_t torchlamb_abi() { return TORCHLAMB_ABI; }

const char* torchlamb_set_isa(const char* highest) {
  kernels = &kernels_baseline;
  const char* name = "baseline";
#ifdef TORCHLAMB_X86
  __builtin_cpu_init();
  auto allows = [&](const char* isa) { return std::strcmp(highest, isa) == 0; };
  bool f16c = __builtin_cpu_supports("f16c");
  if ((allows("avx2") || allows("avx512")) && f16c && __builtin_cpu_supports("avx2")) {
    kernels = &kernels_avx2, name = "avx2";
    if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      kernels = &kernels_avx512, name = "avx512";
    }
  }
#else
  (void)highest;
#endif
  return name;
}

int32_t torchlamb_grad_sq_norms(const Rows* rows, const Options* options, ParallelFor parallel_for, float* out) {
  Step step(*rows, *options, parallel_for, false);
  std::vector<Chunk> chunks = step.chunks(0, rows->count);
  std::vector<double> sums(chunks.size()), totals(rows->count, 0.0);
  int32_t error =
      for_each(chunks.size(), false, parallel_for, [&](int64_t i) { sums[i] = kernels->grad_squares(*rows, chunks[i]); });
  for (size_t i = 0; i < chunks.size(); ++i) totals[chunks[i].row] += sums[i];
  for (int64_t row = 0; row < rows->count; ++row) out[row] = float(totals[row]);
  return error;
}

int32_t torchlamb_accumulate(const Rows* rows, const Options* options, ParallelFor parallel_for, float* sums) {
  Step step(*rows, *options, parallel_for, true);
  return step.skip ? 0 : step.accumulate(step.chunks(0, rows->count), sums);
}

int32_t torchlamb_apply(const Rows* rows, const Options* options, ParallelFor parallel_for, float* sums) {
  Step step(*rows, *options, parallel_for, false);
  return step.skip ? 0 : step.apply(step.chunks(0, rows->count), sums);
}

int32_t torchlamb_step(const Rows* rows, const Options* options, ParallelFor parallel_for, float* sums) {
  Step step(*rows, *options, parallel_for, true);
  int32_t error = 0;
  for (int64_t first = 0, last; !step.skip && error == 0 && first < rows->count; first = last) {
    int64_t elements = 0;
    for (last = first; last < rows->count && (last == first || elements + rows->sizes[last] <= BATCH); ++last) {
      elements += rows->sizes[last];
    }
    std::vector<Chunk> chunks = step.chunks(first, last);
    error = step.accumulate(chunks, sums);
    if (error == 0) error = step.apply(chunks, sums);
  }
  return error;
}
}
