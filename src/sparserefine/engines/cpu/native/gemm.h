// The microkernel that all convolutions share, the packing of its weights, and the epilogue of its results.
#pragma once
#include "simd.h"

// A tile of MR rows by NV vectors stays in registers: 24 sums in 32 registers with AVX-512, 12 in 16 otherwise. Tiles
// are tall rather than wide, because weights are loaded from the cache once for all rows.
constexpr int MAX_NV = 2;
constexpr int rows_of(int nv) { return VL == 16 ? 12 : nv == 2 ? 6 : 10; }
constexpr int MAX_MR = 12;

// Weights used at once [floats]: they stay in the first-level cache while all rows of a block are processed.
constexpr int64_t WEIGHT_FLOATS = 4096;

// The output channels, divided into panels as wide as a tile. Weights are stored panel after panel, [depth][width]
// each, padded with zeros beyond `cout`; depth is T * C_in.
struct Panels {
  int64_t cout;
  int nv;
  explicit Panels(int64_t cout) : cout(cout), nv(cout > VL ? MAX_NV : 1) {}
  int64_t count() const { return ceil_div(cout, nv * VL); }
  int64_t first(int64_t p) const { return p * nv * VL; }
  int64_t channels(int64_t p) const { return smaller<int64_t>(nv * VL, cout - first(p)); }
  int vectors(int64_t p) const { return (int)ceil_div(channels(p), VL); }
  int64_t width() const { return round_up(cout, VL); }
  int64_t offset(int64_t p, int64_t depth) const { return first(p) * depth; }
};

// c [MR, NV * VL] (+)= sum over taps and k of rows[tap][m][k] * b[tap][k][:]. Row pointers replace a gather.
template <int MR, int NV>
static void multiply_tile(const float* const* rows, int64_t taps, int64_t tap_stride, int64_t from, int64_t depth,
                          const float* b, int64_t b_stride, float* c, bool accumulate) {
  vec sum[MR][NV];
  SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++)
    sum[m][v] = accumulate ? load(c + (m * NV + v) * VL) : vec{};
  for (int64_t t = 0; t < taps; t++) {
    const float* a[MR];
    SR_UNROLL for (int m = 0; m < MR; m++) a[m] = rows[t * tap_stride + m] + from;
    const float* row = b + t * b_stride;
    for (int64_t k = 0; k < depth; k++, row += NV * VL) {
      vec w[NV];
      SR_UNROLL for (int v = 0; v < NV; v++) w[v] = load(row + v * VL);
      SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] += a[m][k] * w[v];
    }
  }
  SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++)
    store(c + (m * NV + v) * VL, sum[m][v]);
}

typedef void (*MultiplyTile)(const float* const*, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, float*,
                             bool);
SR_INLINE MultiplyTile tile_function(int nv) {
  return nv == 2 ? multiply_tile<rows_of(2), 2> : multiply_tile<rows_of(1), 1>;
}

// What a kernel does with a result v = sum + bias + residual: stores it as it is, and up to twice normalised and
// activated for the layers that read it: relu(v * scale + shift), as float or rounded to 8 bits. Null pointers switch
// parts off. Same layout in Python (structures.py). Layers cannot normalise while reading instead, because a missing
// neighbour must be zero after the activation.
struct Activated {
  void* out;       // [n, cout] of float or, if `quantised`, uint8
  int64_t stride;  // elements
  const float *scale, *shift;
  int64_t quantised;
};
struct Epilogue {
  const float* residual;
  int64_t residual_stride;
  const float* bias;
  float* raw;
  int64_t raw_stride;
  Activated activated[2];
};

// Rounds to the nearest integer, at most 255.
SR_INLINE void put_bytes(uint8_t* p, vec y, int64_t n) {
  typedef uint8_t bytes __attribute__((vector_size(VL)));
  const vec rounded = (y < 255.f ? y : splat(255.f)) + 0.5f;
  const bytes values = __builtin_convertvector(__builtin_convertvector(rounded, ivec), bytes);
  if (n >= VL) memcpy(p, &values, VL);
  else
    for (int64_t i = 0; i < n; i++) p[i] = values[i];
}

SR_INLINE void finish_vector(const Epilogue& e, vec v, int64_t row, int64_t channel, int64_t n) {
  const bool whole = n >= VL;
  auto get = [&](const float* p) { return whole ? load(p) : load_part(p, n); };
  auto put = [&](float* p, vec x) { whole ? store(p, x) : store_part(p, x, n); };
  if (e.bias) v += get(e.bias + channel);
  if (e.residual) v += get(e.residual + row * e.residual_stride + channel);
  if (e.raw) put(e.raw + row * e.raw_stride + channel, v);
  SR_UNROLL for (int i = 0; i < 2; i++) {
    const Activated& a = e.activated[i];
    if (!a.out) continue;
    const vec y = relu(v * get(a.scale + channel) + get(a.shift + channel));
    if (a.quantised) put_bytes((uint8_t*)a.out + row * a.stride + channel, y, n);
    else put((float*)a.out + row * a.stride + channel, y);
  }
}

// Channels first..first + n of one row.
SR_INLINE void finish_row(const Epilogue& e, const float* sums, int64_t row, int64_t first, int64_t n) {
  for (int64_t c = 0; c < n; c += VL) finish_vector(e, load(sums + c), row, first + c, n - c);
}
