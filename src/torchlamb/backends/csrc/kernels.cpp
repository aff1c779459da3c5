// One chunk, in tiles that stay in the first-level cache. Built once for each instruction set, with TORCHLAMB_KERNELS naming the
// table. Every build and every number of threads gives the same bits: no multiplication is fused with an addition, and sums run
// in LANES fixed lanes however wide the registers are.

#include "kernels.h"

#include <cmath>

#include "convert.h"

namespace {

constexpr int64_t TILE = 512;  // elements; their sums are float32, those of more are float64
constexpr int64_t LANES = 16;

struct Tile {
  alignas(64) float weight[TILE], grad[TILE], exp_avg[TILE], exp_avg_sq[TILE], update[TILE];
  alignas(64) uint32_t bits[TILE];
  alignas(64) uint16_t low[TILE];
};

// Memory. What is float32 is worked on where it is, everything else in the tile.

const float* read(const void* memory, int64_t dtype, int64_t begin, int64_t n, float* buffer) {
  if (dtype == FLOAT32) return static_cast<const float*>(memory) + begin;
  const uint16_t* from = static_cast<const uint16_t*>(memory) + begin;
  if (dtype == BFLOAT16) {
    from_bfloat16(from, buffer, n);
  } else {
    from_float16(from, buffer, n);
  }
  return buffer;
}

float* open(void* memory, int64_t dtype, int64_t begin, int64_t n, float* buffer) {
  return const_cast<float*>(read(memory, dtype, begin, n, buffer));
}

void write(const float* values, void* memory, int64_t dtype, int64_t begin, int64_t n) {
  if (dtype == FLOAT32) return;  // it was worked on where it is
  uint16_t* to = static_cast<uint16_t*>(memory) + begin;
  if (dtype == BFLOAT16) {
    to_bfloat16(values, to, n);
  } else {
    to_float16(values, to, n);
  }
}

// The parameter as arithmetic takes it: see `weight` in bucket.py.
float* open_weight(const Rows& rows, int64_t row, int64_t begin, int64_t n, Tile& tile) {
  void* param = rows.params[row];
  float* weight = open(param, rows.param_dtype, begin, n, tile.weight);
  if (rows.masters == nullptr) return weight;
  const float* master = rows.masters[row] + begin;
  float* rounded = tile.update;  // not needed yet
  write(master, tile.low, rows.param_dtype, 0, n);
  read(tile.low, rows.param_dtype, 0, n, rounded);
  for (int64_t i = 0; i < n; ++i) weight[i] = weight[i] == rounded[i] ? master[i] : weight[i];
  return weight;
}

// Random bits: see rounding.py.

void fill_bits(const Rows& rows, const RowNumbers& numbers, int64_t row, int64_t begin, int64_t n, uint32_t* bits) {
  const uint32_t key1 = numbers.key1, key2 = numbers.key2;
  const Runs& runs = rows.runs[row];
  for (int64_t i = 0; i < n;) {
    int64_t element = begin + i, within = element, start = runs.first, last = n;
    if (runs.starts != nullptr) {
      within = element % runs.length;
      start += runs.starts[element / runs.length];
      last = i + runs.length - within < n ? i + runs.length - within : n;
    }
    uint64_t index = uint64_t(start + runs.stride * within), stride = uint64_t(runs.stride);
    for (; i < last; ++i, index += stride) {
      bits[i] = mix(mix(uint32_t(index) ^ key1) ^ uint32_t(index >> 32) ^ key2);
    }
  }
}

// The rule: see rule.py.

void advance(const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n, const Scalars& s) {
  const float factor = s.grad_factor, beta1 = s.beta1, beta2 = s.beta2, weight = s.grad_weight, weight2 = s.grad_sq_weight;
  if (s.flags & GRAD_AVERAGING) {
    for (int64_t i = 0; i < n; ++i) {
      float grad = g[i] * factor;
      m[i] += weight * (grad - m[i]);
      v[i] = beta2 * v[i] + weight2 * (grad * grad);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      float grad = g[i] * factor;
      m[i] = beta1 * m[i] + grad;
      v[i] = beta2 * v[i] + weight2 * (grad * grad);
    }
  }
}

void compute_update(const float* __restrict w, const float* __restrict m, const float* __restrict v, float* __restrict u,
                    int64_t n, const Scalars& s, const RowNumbers& numbers) {
  const float eps = numbers.eps, k = numbers.k, decay = s.weight_decay;
  if (decay == 0.0f) {  // 0 times a parameter that is not finite would not be 0
    for (int64_t i = 0; i < n; ++i) u[i] = k * (m[i] / (std::sqrt(v[i]) + eps));
  } else {
    for (int64_t i = 0; i < n; ++i) u[i] = k * (m[i] / (std::sqrt(v[i]) + eps)) + decay * w[i];
  }
}

// Sums of squares.

struct Squares {
  double lanes[LANES] = {};

  void add(const float* x, int64_t n) {
    float tile[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) tile[lane] += x[i + lane] * x[i + lane];
    }
    for (int64_t lane = 0; i < n; ++i, ++lane) tile[lane] += x[i] * x[i];
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += tile[lane];
  }

  double total() const {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// Chunks.

double grad_squares(const Rows& rows, const Chunk& chunk) {
  Tile tile;
  Squares squares;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
    int64_t n = chunk.end - begin < TILE ? chunk.end - begin : TILE;
    squares.add(read(rows.grads[chunk.row], rows.grad_dtype, begin, n, tile.grad), n);
  }
  return squares.total();
}

Sums accumulate(const Rows& rows, const Scalars& s, const RowNumbers& numbers, const Chunk& chunk) {
  Tile tile;
  Squares params, updates;
  const int64_t row = chunk.row;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
    int64_t n = chunk.end - begin < TILE ? chunk.end - begin : TILE;
    const float* grad = read(rows.grads[row], rows.grad_dtype, begin, n, tile.grad);
    float* exp_avg = open(rows.exp_avgs[row], rows.exp_avg_dtype, begin, n, tile.exp_avg);
    float* exp_avg_sq = open(rows.exp_avg_sqs[row], rows.exp_avg_sq_dtype, begin, n, tile.exp_avg_sq);
    advance(grad, exp_avg, exp_avg_sq, n, s);
    // The update is taken of the moments as they are stored: `apply` finds nothing else.
    write(exp_avg, rows.exp_avgs[row], rows.exp_avg_dtype, begin, n);
    read(rows.exp_avgs[row], rows.exp_avg_dtype, begin, n, tile.exp_avg);
    if (rows.exp_avg_sq_dtype == BFLOAT16) {
      uint16_t* to = static_cast<uint16_t*>(rows.exp_avg_sqs[row]) + begin;
      fill_bits(rows, numbers, row, begin, n, tile.bits);
      to_bfloat16_stochastically(exp_avg_sq, to, tile.bits, 0, n);
      from_bfloat16(to, tile.exp_avg_sq, n);
    }
    const float* weight = open_weight(rows, row, begin, n, tile);
    params.add(weight, n);
    compute_update(weight, exp_avg, exp_avg_sq, tile.update, n, s, numbers);
    updates.add(tile.update, n);
  }
  return {params.total(), updates.total()};
}

void apply(const Rows& rows, const Scalars& s, const RowNumbers& numbers, const Chunk& chunk, float size) {
  Tile tile;
  const int64_t row = chunk.row, tiles = (chunk.end - chunk.begin + TILE - 1) / TILE;
  for (int64_t t = tiles - 1; t >= 0; --t) {  // backwards: what was walked last is still in cache
    int64_t begin = chunk.begin + t * TILE, n = chunk.end - begin < TILE ? chunk.end - begin : TILE;
    const float* exp_avg = read(rows.exp_avgs[row], rows.exp_avg_dtype, begin, n, tile.exp_avg);
    const float* exp_avg_sq = read(rows.exp_avg_sqs[row], rows.exp_avg_sq_dtype, begin, n, tile.exp_avg_sq);
    float* weight = open_weight(rows, row, begin, n, tile);
    compute_update(weight, exp_avg, exp_avg_sq, tile.update, n, s, numbers);
    for (int64_t i = 0; i < n; ++i) weight[i] -= size * tile.update[i];
    if (rows.masters != nullptr) std::memcpy(rows.masters[row] + begin, weight, n * sizeof(float));
    if (s.flags & ROUND_PARAMS_STOCHASTICALLY) {
      fill_bits(rows, numbers, row, begin, n, tile.bits);
      to_bfloat16_stochastically(weight, static_cast<uint16_t*>(rows.params[row]) + begin, tile.bits, 16, n);
    } else {
      write(weight, rows.params[row], rows.param_dtype, begin, n);
    }
  }
}

}  // namespace

extern const Kernels TORCHLAMB_KERNELS = {grad_squares, accumulate, apply};
