// The gated ensembler at inference, in one pass over the sites. GatedEnsembler in stages/ensembler.py defines the
// results. Each lane holds one site. Blocks of sites are transposed, so that vectors are full for any number of
// classes, and all intermediate values stay in registers and caches.
#include "transcendental.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

extern "C" int omp_get_thread_num(void);

// Shuffles with constant indices; GCC and Clang name the builtin differently.
#if VL == 16
#define SR_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SR_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define SR_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define SR_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif VL == 8
#define SR_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SR_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define SR_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define SR_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define SR_LOW 0, 4, 1, 5
#define SR_HIGH 2, 6, 3, 7
#define SR_EVEN 0, 2, 4, 6
#define SR_ODD 1, 3, 5, 7
#endif
#if defined(__clang__)
#define SR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

namespace {

constexpr int64_t VECTORS = 2;           // of sites processed together
constexpr int64_t BLOCK = VECTORS * VL;  // sites
constexpr int64_t CHUNK = 256;           // sites per work item
// Hidden units at once. UNITS * VECTORS sums stay in registers: AVX-512 has 32, the others have 16.
constexpr int64_t UNITS = VL == 16 ? 8 : VL == 8 ? 5 : 4;

struct Mlp {  // Linear, ReLU, Linear; weights are [out, in]
  const float *weight1, *bias1, *weight2, *bias2;
  int64_t hidden;
};

// ---- packed weights: for each group of UNITS hidden units their biases, first-layer weights and second-layer weights;
// the last group is padded with zeros

// Probabilities sum to 1, so the last one is not an input: its weight is folded into the other weights and the bias.
int64_t gate_inputs(int64_t classes) { return 2 * classes; }
int64_t gate_floats(int64_t classes) { return (gate_inputs(classes) + 2) * UNITS; }
int64_t fuser_floats(int64_t classes) { return (2 * classes + 1) * UNITS; }

void pack(const Mlp& gate, const Mlp& fuser, int64_t classes, float* gate_packed, float* fuser_packed) {
  const int64_t seen = 2 * (classes + 1), last = classes - 1;
  for (int64_t u = 0; u < round_up(gate.hidden, UNITS); u++) {
    float* out = gate_packed + u / UNITS * gate_floats(classes) + u % UNITS;
    const bool real = u < gate.hidden;
    const float* row = gate.weight1 + (real ? u : 0) * seen;
    out[0] = real ? gate.bias1[u] + row[last] + row[classes + last] : 0;
    for (int64_t k = 0; k < last; k++) {
      out[(1 + k) * UNITS] = real ? row[k] - row[last] : 0;
      out[(1 + last + k) * UNITS] = real ? row[classes + k] - row[classes + last] : 0;
    }
    for (int64_t i = 0; i < 2; i++) out[(1 + 2 * last + i) * UNITS] = real ? row[2 * classes + i] : 0;
    out[(1 + 2 * classes) * UNITS] = real ? gate.weight2[u] : 0;
  }
  for (int64_t u = 0; u < round_up(fuser.hidden, UNITS); u++) {
    float* out = fuser_packed + u / UNITS * fuser_floats(classes) + u % UNITS;
    const bool real = u < fuser.hidden;
    out[0] = real ? fuser.bias1[u] : 0;
    for (int64_t k = 0; k < classes; k++) {
      out[(1 + k) * UNITS] = real ? fuser.weight1[u * classes + k] : 0;
      out[(1 + classes + k) * UNITS] = real ? fuser.weight2[k * fuser.hidden + u] : 0;
    }
  }
}

// ---- [sites, classes] <-> [classes, BLOCK]

SR_INLINE void transpose(vec (&rows)[VL]) {
  SR_UNROLL for (int round = 1; round < VL; round *= 2) {
    vec shuffled[VL];
    SR_UNROLL for (int i = 0; i < VL / 2; i++) {
      shuffled[2 * i] = SR_SHUFFLE(rows[i], rows[i + VL / 2], SR_LOW);
      shuffled[2 * i + 1] = SR_SHUFFLE(rows[i], rows[i + VL / 2], SR_HIGH);
    }
    SR_UNROLL for (int i = 0; i < VL; i++) rows[i] = shuffled[i];
  }
}

SR_INLINE vec load_some(const float* p, int64_t n) { return n >= VL ? load(p) : load_part(p, larger(n, (int64_t)0)); }
SR_INLINE void store_some(float* p, vec v, int64_t n) {
  if (n >= VL) store(p, v);
  else if (n > 0) store_part(p, v, n);
}

// Reads the first `count` >= 1 sites. Further lanes hold values that are computed with but never stored.
SR_INLINE void read(const float* logits, int64_t classes, int64_t count, float* columns) {
  for (int64_t v = 0; v < BLOCK; v += VL) {
    if (classes == 2) {
      const vec a = load_some(logits + 2 * v, 2 * (count - v));
      const vec b = load_some(logits + 2 * v + VL, 2 * (count - v) - VL);
      store(columns + v, SR_SHUFFLE(a, b, SR_EVEN));
      store(columns + BLOCK + v, SR_SHUFFLE(a, b, SR_ODD));
      continue;
    }
    for (int64_t k = 0; k < classes; k += VL) {
      vec tile[VL];
      SR_UNROLL for (int i = 0; i < VL; i++)
        tile[i] = load_some(logits + smaller(v + i, count - 1) * classes + k, classes - k);
      transpose(tile);
      SR_UNROLL for (int i = 0; i < VL; i++) store(columns + (k + i) * BLOCK + v, tile[i]);
    }
  }
}

SR_INLINE void write(const float* columns, int64_t classes, int64_t count, float* logits) {
  for (int64_t v = 0; v < smaller(count, BLOCK); v += VL) {
    if (classes == 2) {
      const vec a = load(columns + v), b = load(columns + BLOCK + v);
      store_some(logits + 2 * v, SR_SHUFFLE(a, b, SR_LOW), 2 * (count - v));
      store_some(logits + 2 * v + VL, SR_SHUFFLE(a, b, SR_HIGH), 2 * (count - v) - VL);
      continue;
    }
    for (int64_t k = 0; k < classes; k += VL) {
      vec tile[VL];
      SR_UNROLL for (int i = 0; i < VL; i++) tile[i] = load(columns + (k + i) * BLOCK + v);
      transpose(tile);
      for (int i = 0; i < smaller<int64_t>(VL, count - v); i++)
        store_some(logits + (v + i) * classes + k, tile[i], classes - k);
    }
  }
}

// ---- inputs of the gate

SR_INLINE vec at_least(vec v, float lowest) { return larger_of(splat(lowest), v); }  // NaN stays NaN

// Logits of two classes -> probability of the first; entropy log(1 + e) + |m| e / (1 + e), e = exp(-|m|), m = z1 - z0.
SR_INLINE void see_two(const float* logits, float* probability, float* entropy) {
  SR_UNROLL for (int64_t v = 0; v < BLOCK; v += VL) {
    const vec margin = load(logits + BLOCK + v) - load(logits + v);
    const vec s = at_least(margin > 0.f ? -margin : margin, LOWEST), e = exp_of(s);
    const vec total = 1.f + e, share = 1.f / total;
    store(probability + v, margin > 0.f ? e * share : share);
    store(entropy + v, at_least(log_of(total) - s * e * share, 0));
  }
}

// Logits -> probabilities of all classes but the last; entropy log T - sum(s e) / T, with s = z - max z, e = exp s,
// T = sum e.
SR_INLINE void see(const float* logits, int64_t classes, float* probabilities, float* entropy) {
  vec most[VECTORS], total[VECTORS]{}, dot[VECTORS]{};
  SR_UNROLL for (int64_t v = 0; v < VECTORS; v++) most[v] = load(logits + v * VL);
  for (int64_t k = 1; k < classes; k++)
    SR_UNROLL for (int64_t v = 0; v < VECTORS; v++) {
      const vec z = load(logits + k * BLOCK + v * VL);
      most[v] = larger_of(z, most[v]);
    }
  for (int64_t k = 0; k < classes; k++)
    SR_UNROLL for (int64_t v = 0; v < VECTORS; v++) {
      const vec s = at_least(load(logits + k * BLOCK + v * VL) - most[v], LOWEST), e = exp_of(s);
      total[v] += e;
      dot[v] += s * e;
      if (k < classes - 1) store(probabilities + k * BLOCK + v * VL, e);
    }
  SR_UNROLL for (int64_t v = 0; v < VECTORS; v++) {
    const vec scale = 1.f / total[v];
    store(entropy + v * VL, at_least(log_of(total[v]) - dot[v] * scale, 0));
    total[v] = scale;
  }
  for (int64_t k = 0; k < classes - 1; k++)
    SR_UNROLL for (int64_t v = 0; v < VECTORS; v++) {
      float* const e = probabilities + k * BLOCK + v * VL;
      store(e, load(e) * total[v]);
    }
}

// ---- both perceptrons

// UNITS hidden units: relu(bias + weights times inputs).
SR_INLINE void hidden_units(const float* x, int64_t inputs, const float* weights, vec (&h)[UNITS][VECTORS]) {
  SR_UNROLL for (int u = 0; u < UNITS; u++) SR_UNROLL for (int v = 0; v < VECTORS; v++) h[u][v] = splat(weights[u]);
  for (int64_t i = 0; i < inputs; i++) {
    const float* row = weights + (1 + i) * UNITS;
    vec value[VECTORS];
    SR_UNROLL for (int v = 0; v < VECTORS; v++) value[v] = load(x + i * BLOCK + v * VL);
    SR_UNROLL for (int u = 0; u < UNITS; u++) SR_UNROLL for (int v = 0; v < VECTORS; v++) h[u][v] += row[u] * value[v];
  }
  SR_UNROLL for (int u = 0; u < UNITS; u++) SR_UNROLL for (int v = 0; v < VECTORS; v++) h[u][v] = at_least(h[u][v], 0);
}

struct Gated {
  const float* gate;  // packed
  const float* fuser;
  int64_t gate_hidden, fuser_hidden;
  float gate_bias;
  const float* fuser_bias;
  bool residual;
};

// Scratch per thread [floats]: both predictions, and the gate's inputs, which the blend and the result overwrite.
int64_t scratch_floats(int64_t classes) { return 4 * round_up(classes, VL) * BLOCK; }

// CLASSES: the number of classes if known at compile time, otherwise 0.
template <int64_t CLASSES>
SR_INLINE void block(const Gated& g, const float* coarse, const float* sparse, int64_t given, int64_t count,
                     float* refined, float* scratch) {
  const int64_t classes = CLASSES ? CLASSES : given, inputs = gate_inputs(classes);
  const int64_t whole = round_up(classes, VL) * BLOCK;
  float *const c = scratch, *const s = c + whole, *const x = s + whole;
  read(coarse, classes, count, c);
  read(sparse, classes, count, s);
  if (CLASSES == 2) {
    see_two(c, x, x + 2 * BLOCK);
    see_two(s, x + BLOCK, x + 3 * BLOCK);
  } else {
    see(c, classes, x, x + (inputs - 2) * BLOCK);
    see(s, classes, x + (classes - 1) * BLOCK, x + (inputs - 1) * BLOCK);
  }

  vec h[UNITS][VECTORS], of_coarse[VECTORS], of_sparse[VECTORS];
  SR_UNROLL for (int v = 0; v < VECTORS; v++) of_coarse[v] = splat(g.gate_bias);
  const float* weights = g.gate;
  for (int64_t u = 0; u < g.gate_hidden; u += UNITS, weights += gate_floats(classes)) {
    hidden_units(x, inputs, weights, h);
    const float* row = weights + (1 + inputs) * UNITS;
    SR_UNROLL for (int i = 0; i < UNITS; i++) SR_UNROLL for (int v = 0; v < VECTORS; v++)
      of_coarse[v] += row[i] * h[i][v];
  }
  SR_UNROLL for (int v = 0; v < VECTORS; v++) {
    const vec opened = of_coarse[v], e = exp_of(at_least(opened > 0.f ? -opened : opened, LOWEST));
    const vec share = 1.f / (1.f + e), rest = e * share;
    of_coarse[v] = opened > 0.f ? share : rest;
    of_sparse[v] = opened > 0.f ? rest : share;
  }

  float *const blend = x, *const y = x + whole;
  for (int64_t k = 0; k < classes; k++)
    SR_UNROLL for (int v = 0; v < VECTORS; v++) {
      const int64_t at = k * BLOCK + v * VL;
      const vec blended = of_coarse[v] * load(c + at) + of_sparse[v] * load(s + at);
      store(blend + at, blended);
      store(y + at, g.residual ? blended + g.fuser_bias[k] : splat(g.fuser_bias[k]));
    }
  weights = g.fuser;
  for (int64_t u = 0; u < g.fuser_hidden; u += UNITS, weights += fuser_floats(classes)) {
    hidden_units(blend, classes, weights, h);
    for (int64_t k = 0; k < classes; k++) {
      const float* row = weights + (1 + classes + k) * UNITS;
      vec sum[VECTORS];
      SR_UNROLL for (int v = 0; v < VECTORS; v++) sum[v] = load(y + k * BLOCK + v * VL);
      SR_UNROLL for (int i = 0; i < UNITS; i++) SR_UNROLL for (int v = 0; v < VECTORS; v++)
        sum[v] += row[i] * h[i][v];
      SR_UNROLL for (int v = 0; v < VECTORS; v++) store(y + k * BLOCK + v * VL, sum[v]);
    }
  }
  write(y, classes, count, refined);
}

template <int64_t CLASSES>
void chunk(const Gated& g, const float* coarse, const float* sparse, int64_t classes, int64_t start, int64_t end,
           float* refined, float* scratch) {
  for (int64_t i = start; i < end; i += BLOCK) {
    const int64_t at = i * classes;
    block<CLASSES>(g, coarse + at, sparse + at, classes, smaller(BLOCK, end - i), refined + at, scratch);
  }
}

}  // namespace

SR_SIZE_OF(Mlp)

// Scratch memory per thread of sr_gate [floats].
SR_API int64_t sr_gate_scratch(int64_t classes) { return scratch_floats(classes); }

// Size of the packed weights [floats].
SR_API int64_t sr_gate_packed(int64_t classes, int64_t gate_hidden, int64_t fuser_hidden) {
  return ceil_div(gate_hidden, UNITS) * gate_floats(classes) + ceil_div(fuser_hidden, UNITS) * fuser_floats(classes);
}

// coarse, sparse -> refined, all [sites, classes]. gate: 2 (classes + 1) -> 1, fuser: classes -> classes.
SR_API int64_t sr_gate(const float* coarse, const float* sparse, int64_t sites, int64_t classes, const Mlp* gate,
                       const Mlp* fuser, int64_t residual, float* refined, float* packed, float* scratch,
                       int64_t threads) {
  float* const fuser_packed = packed + ceil_div(gate->hidden, UNITS) * gate_floats(classes);
  pack(*gate, *fuser, classes, packed, fuser_packed);
  const Gated g{packed, fuser_packed, gate->hidden, fuser->hidden, gate->bias2[0], fuser->bias2, residual != 0};
  const int64_t items = ceil_div(sites, CHUNK);
#pragma omp parallel for num_threads(items > 1 ? threads : 1) schedule(dynamic)
  for (int64_t item = 0; item < items; item++) {
    const int64_t start = item * CHUNK, end = smaller(start + CHUNK, sites);
    float* const own = scratch + omp_get_thread_num() * scratch_floats(classes);
    if (classes == 2) chunk<2>(g, coarse, sparse, classes, start, end, refined, own);
    else chunk<0>(g, coarse, sparse, classes, start, end, refined, own);
  }
  return SR_OK;
}
