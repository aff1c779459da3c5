// One chunk, in tiles that stay in the first-level cache. Built once for each instruction set, with TORCHLAMB_KERNELS naming the
// table. Every build and every number of threads gives the same bits: no multiplication is fused with an addition, and sums run
// in LANES fixed lanes however wide the registers are.

#include "kernels.h"

#include "convert.h"
#include "vector.h"

namespace {

constexpr int64_t TILE = 512;  // elements; their sums are float32, those of more are float64

struct Tile {
  alignas(64) float weight[TILE], grad[TILE], exp_avg[TILE], exp_avg_sq[TILE], rounded[TILE];
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

// The parameter as arithmetic takes it: see `weight` in precision.py.
float* open_weight(const Rows& rows, int64_t row, int64_t begin, int64_t n, Tile& tile) {
  void* param = rows.params[row];
  float* weight = open(param, rows.param_dtype, begin, n, tile.weight);
  if (rows.masters == nullptr) return weight;
  const float* master = rows.masters[row] + begin;
  write(master, tile.low, rows.param_dtype, 0, n);
  read(tile.low, rows.param_dtype, 0, n, tile.rounded);
  for (int64_t i = 0; i < n; ++i) weight[i] = weight[i] == tile.rounded[i] ? master[i] : weight[i];
  return weight;
}

// Random bits: see precision.py.

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

// The rule: see rule.py. V is a Register, or a float for the last elements of a row: the same operations, so the same bits.

inline float square_root(float x) { return std::sqrt(x); }

struct Rule {
  // Copies: what is stored through a float pointer could change the originals, as far as the compiler can tell.
  const float factor, beta1, beta2, grad_weight, grad_sq_weight, eps, k, decay;
  const bool averages, from_grad, decays;

  Rule(const Scalars& s, const RowNumbers& numbers)
      : factor(s.grad_factor), beta1(s.beta1), beta2(s.beta2), grad_weight(s.grad_weight), grad_sq_weight(s.grad_sq_weight),
        eps(numbers.eps), k(numbers.k), decay(s.weight_decay), averages(s.flags & GRAD_AVERAGING), from_grad(beta1 <= 0.5f),
        decays(decay != 0.0f) {}

  template <class V>
  void advance(V grad, V& exp_avg, V& exp_avg_sq) const {
    grad *= factor;
    // From the one that weighs more, or the digits of a gradient are lost beside a moment that is hardly kept.
    if (averages) exp_avg = from_grad ? grad - beta1 * (grad - exp_avg) : exp_avg + grad_weight * (grad - exp_avg);
    else exp_avg = beta1 * exp_avg + grad;
    exp_avg_sq = beta2 * exp_avg_sq + grad_sq_weight * (grad * grad);
  }

  template <class V>
  V update(V weight, V exp_avg, V exp_avg_sq) const {
    V direction = k * (exp_avg / (square_root(exp_avg_sq) + eps));
    return decays ? direction + decay * weight : direction;  // 0 times a weight that is not finite would not be 0
  }
};

void advance(const float* g, float* m, float* v, int64_t n, const Rule rule) {
  for (int64_t i = 0; i < n; ++i) rule.advance(g[i], m[i], v[i]);
}

// Add up the squares of weight and update; before that, advance the moments if they are stored as they are computed.
template <bool ADVANCE>
void accumulate_tile(const float* g, float* m, float* v, const float* w, int64_t n, const Rule rule, Total& params,
                     Total& updates) {
  Squares param_squares, update_squares;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int64_t r = 0; r < REGISTERS; ++r) {
      int64_t at = i + r * WIDTH;
      Register exp_avg = load(m + at), exp_avg_sq = load(v + at), weight = load(w + at);
      if (ADVANCE) {
        rule.advance(load(g + at), exp_avg, exp_avg_sq);
        store(exp_avg, m + at);
        store(exp_avg_sq, v + at);
      }
      param_squares.add(r, weight);
      update_squares.add(r, rule.update(weight, exp_avg, exp_avg_sq));
    }
  }
  float rest[LANES];
  for (int64_t j = i; j < n; ++j) {
    if (ADVANCE) rule.advance(g[j], m[j], v[j]);
    rest[j - i] = rule.update(w[j], m[j], v[j]);
  }
  param_squares.add_rest(w + i, n - i);
  update_squares.add_rest(rest, n - i);
  params.add(param_squares);
  updates.add(update_squares);
}

void subtract(float* w, const float* m, const float* v, int64_t n, const Rule rule, float size) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    Register weight = load(w + i);
    store(weight - size * rule.update(weight, load(m + i), load(v + i)), w + i);
  }
  for (; i < n; ++i) w[i] -= size * rule.update(w[i], m[i], v[i]);
}

// Chunks.

double grad_squares(const Rows& rows, const Chunk& chunk) {
  Tile tile;
  Total total;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
    int64_t n = chunk.end - begin < TILE ? chunk.end - begin : TILE, i = 0;
    const float* grad = read(rows.grads[chunk.row], rows.grad_dtype, begin, n, tile.grad);
    Squares squares;
    for (; i + LANES <= n; i += LANES) {
      for (int64_t r = 0; r < REGISTERS; ++r) squares.add(r, load(grad + i + r * WIDTH));
    }
    squares.add_rest(grad + i, n - i);
    total.add(squares);
  }
  return total.sum();
}

Sums accumulate(const Rows& rows, const Scalars& s, const RowNumbers& numbers, const Chunk& chunk) {
  Tile tile;
  Total params, updates;
  const Rule rule(s, numbers);
  const int64_t row = chunk.row;
  const bool as_computed = rows.exp_avg_dtype == FLOAT32 && rows.exp_avg_sq_dtype == FLOAT32;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
    int64_t n = chunk.end - begin < TILE ? chunk.end - begin : TILE;
    const float* grad = read(rows.grads[row], rows.grad_dtype, begin, n, tile.grad);
    float* exp_avg = open(rows.exp_avgs[row], rows.exp_avg_dtype, begin, n, tile.exp_avg);
    float* exp_avg_sq = open(rows.exp_avg_sqs[row], rows.exp_avg_sq_dtype, begin, n, tile.exp_avg_sq);
    const float* weight = open_weight(rows, row, begin, n, tile);
    if (as_computed) {
      accumulate_tile<true>(grad, exp_avg, exp_avg_sq, weight, n, rule, params, updates);
      continue;
    }
    advance(grad, exp_avg, exp_avg_sq, n, rule);
    // The update is taken of the moments as they are stored: `apply` finds nothing else.
    write(exp_avg, rows.exp_avgs[row], rows.exp_avg_dtype, begin, n);
    read(rows.exp_avgs[row], rows.exp_avg_dtype, begin, n, tile.exp_avg);
    if (rows.exp_avg_sq_dtype == BFLOAT16) {
      uint16_t* to = static_cast<uint16_t*>(rows.exp_avg_sqs[row]) + begin;
      fill_bits(rows, numbers, row, begin, n, tile.bits);
      to_bfloat16_stochastically(exp_avg_sq, to, tile.bits, 0, n);
      from_bfloat16(to, tile.exp_avg_sq, n);
    }
    accumulate_tile<false>(nullptr, exp_avg, exp_avg_sq, weight, n, rule, params, updates);
  }
  return {{params.sum(), updates.sum()}};  // in the order of Sum
}

void apply(const Rows& rows, const Scalars& s, const RowNumbers& numbers, const Chunk& chunk, float size) {
  Tile tile;
  const Rule rule(s, numbers);
  const int64_t row = chunk.row;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += TILE) {
    int64_t n = chunk.end - begin < TILE ? chunk.end - begin : TILE;
    const float* exp_avg = read(rows.exp_avgs[row], rows.exp_avg_dtype, begin, n, tile.exp_avg);
    const float* exp_avg_sq = read(rows.exp_avg_sqs[row], rows.exp_avg_sq_dtype, begin, n, tile.exp_avg_sq);
    float* weight = open_weight(rows, row, begin, n, tile);
    subtract(weight, exp_avg, exp_avg_sq, n, rule, size);
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
