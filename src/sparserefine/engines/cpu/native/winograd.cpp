// Submanifold 3x3 convolution by Winograd's minimal filtering F(m x m, 3 x 3) (Lavin and Gray, CVPR 2016) on sparse
// tiles. A tile of 4 x 4 cells with the ring around it reads 36 rows of x; missing rows are zero. m = 4 processes whole
// tiles, m = 2 their non-empty quarters, with less weight memory and less rounding. For each block of tiles: transform
// the inputs, multiply (m + 2)^2 small matrices, transform the results. Intermediate values stay in the cache.
#include "gemm.h"

struct Winograd {
  const float* x;  // [n, cin], rows `x_stride` floats apart
  int64_t x_stride, n, cin;
  const int32_t* tiles;     // [tiles, 6, 6]: rows of x, n where there is none; the inner 4 x 4 are also the outputs
  const int32_t* quarters;  // [count]: 4 tile + quarter, for m = 2; null for m = 4
  int64_t n_tiles, count;
  int64_t m;
  const float* weight;  // packed by sr_pack_winograd
  int64_t cout;
  Epilogue epilogue;
  const float* zeros;  // [cin]
  float* scratch;      // [threads, sr_winograd_scratch]
  int64_t threads;
};
SR_SIZE_OF(Winograd)

extern "C" int omp_get_thread_num(void);

// ---- one-dimensional transforms; `s` is the stride between elements

template <int M> struct Transform;

template <> struct Transform<2> {  // points 0, 1, -1, infinity
  static constexpr int SIZE = 4;
  static constexpr double G[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  SR_INLINE void input(const vec* d, vec* o, int s) {
    o[0] = d[0] - d[2], o[s] = d[1] + d[2], o[2 * s] = d[2] - d[1], o[3 * s] = d[1] - d[3];
  }
  SR_INLINE void output(const vec* d, vec* o, int s) { o[0] = d[0] + d[1] + d[2], o[s] = d[1] - d[2] - d[3]; }
};

template <> struct Transform<4> {  // points 0, 1, -1, 2, -2, infinity
  static constexpr int SIZE = 6;
  static constexpr double G[6][3] = {{1. / 4, 0, 0},
                                     {-1. / 6, -1. / 6, -1. / 6},
                                     {-1. / 6, 1. / 6, -1. / 6},
                                     {1. / 24, 1. / 12, 1. / 6},
                                     {1. / 24, -1. / 12, 1. / 6},
                                     {0, 0, 1}};
  SR_INLINE void input(const vec* d, vec* o, int s) {
    vec a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    o[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    o[s] = a + b, o[2 * s] = a - b, o[3 * s] = c + e, o[4 * s] = c - e;
    o[5 * s] = 4.f * d[1] - 5.f * d[3] + d[5];
  }
  SR_INLINE void output(const vec* d, vec* o, int s) {
    vec a = d[1] + d[2], b = d[1] - d[2], c = d[3] + d[4], e = d[3] - d[4];
    o[0] = d[0] + a + c, o[s] = 2.f * e + b, o[2 * s] = 4.f * c + a, o[3 * s] = 8.f * e + b + d[5];
  }
};

// B^T d B for one vector of channels of one tile. Element i of the result goes to out + i * stride. Rows and columns
// are loops, because the 36 addresses of unrolled code do not fit the registers and take longer than the arithmetic.
template <int M, class Read> SR_INLINE void transform_input(Read read, float* out, int64_t stride) {
  constexpr int A = M + 2;
  vec half[A * A];
  SR_ROLLED for (int j = 0; j < A; j++) {
    vec column[A];
    SR_UNROLL for (int i = 0; i < A; i++) column[i] = read(i * A + j);
    Transform<M>::input(column, half + j, A);
  }
  SR_ROLLED for (int i = 0; i < A; i++) {
    vec row[A];
    Transform<M>::input(half + i * A, row, 1);
    SR_UNROLL for (int j = 0; j < A; j++) store(out + j * stride, row[j]);
    out += A * stride;
  }
}

// A^T m A -> out[M * M].
template <int M> SR_INLINE void transform_output(const float* in, int64_t stride, vec* out) {
  constexpr int A = M + 2;
  vec half[M * A];
  SR_ROLLED for (int j = 0; j < A; j++) {
    vec column[A];
    const float* element = in + j * stride;
    SR_UNROLL for (int i = 0; i < A; i++, element += A * stride) column[i] = load(element);
    Transform<M>::output(column, half + j, A);
  }
  SR_ROLLED for (int i = 0; i < M; i++) Transform<M>::output(half + i * A, out + i * M, 1);
}

// ---- blocks

static const int64_t CACHE_FLOATS = 5 << 16;   // per block: 1.25 MiB of a thread's second-level cache
static const int64_t HEAVY_FLOATS = 1 << 20;   // weights of this size do not fit that cache
static const int64_t MOST_TILES = 384;

static int64_t block_tiles(int64_t m, int64_t count, int64_t cin, int64_t cout, int64_t threads) {
  const int64_t matrices = (m + 2) * (m + 2), mr = rows_of(Panels(cout).nv);
  int64_t tiles;
  if (matrices * cin * cout > HEAVY_FLOATS) {
    // Every block reads the weights again: use few large blocks, equal for all threads, even if they exceed the cache.
    tiles = ceil_div(count, larger<int64_t>(1, round_up(ceil_div(count, MOST_TILES), threads)));
  } else {
    tiles = smaller(CACHE_FLOATS / (matrices * (round_up(cin, VL) + round_up(cout, VL))), ceil_div(count, 4 * threads));
  }
  return round_up(larger(smaller(tiles, MOST_TILES), mr), mr);
}

// Scratch memory per thread [floats].
SR_API int64_t sr_winograd_scratch(int64_t m, int64_t count, int64_t cin, int64_t cout, int64_t threads) {
  const int64_t tiles = block_tiles(m, count, cin, cout, threads);
  return (m + 2) * (m + 2) * ((tiles + MAX_MR) * (round_up(cin, VL) + round_up(cout, VL)) + 32);
}

SR_API int64_t sr_packed_winograd_floats(int64_t m, int64_t cin, int64_t cout) {
  return (m + 2) * (m + 2) * cin * round_up(cout, VL);
}

// weight [9, cin, cout] -> G w G^T, [(m + 2)^2] packed matrices [cin, cout].
template <int M>
static void pack(const float* weight, int64_t cin, int64_t cout, float* packed, int64_t threads) {
  constexpr int A = M + 2;
  constexpr auto& G = Transform<M>::G;
  const Panels panels(cout);
  memset(packed, 0, sr_packed_winograd_floats(M, cin, cout) * sizeof(float));
  for (int64_t p = 0; p < panels.count(); p++) {
    const int64_t width = panels.vectors(p) * VL, channels = panels.channels(p);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < cin; k++)
      for (int64_t c = 0; c < channels; c++) {
        double w[9], half[A][3];
        for (int t = 0; t < 9; t++) w[t] = weight[(t * cin + k) * cout + panels.first(p) + c];
        for (int i = 0; i < A; i++)
          for (int j = 0; j < 3; j++) half[i][j] = G[i][0] * w[j] + G[i][1] * w[3 + j] + G[i][2] * w[6 + j];
        for (int i = 0; i < A; i++)
          for (int j = 0; j < A; j++) {
            const double u = half[i][0] * G[j][0] + half[i][1] * G[j][1] + half[i][2] * G[j][2];
            packed[(i * A + j) * cin * panels.width() + panels.offset(p, cin) + k * width + c] = (float)u;
          }
      }
  }
}

SR_API int64_t sr_pack_winograd(const float* weight, int64_t m, int64_t cin, int64_t cout, float* packed,
                                int64_t threads) {
  m == 2 ? pack<2>(weight, cin, cout, packed, threads) : pack<4>(weight, cin, cout, packed, threads);
  return SR_OK;
}

// ---- the convolution

template <int M> static int64_t convolve(const Winograd& a) {
  constexpr int A = M + 2, MATRICES = A * A;
  const Panels panels(a.cout);
  const int64_t block = block_tiles(M, a.count, a.cin, a.cout, a.threads), blocks = ceil_div(a.count, block);
  const int64_t cin = round_up(a.cin, VL), cout = panels.width();
  // 16 floats more than a power of two; otherwise the matrices of one tile would compete for few cache sets.
  const int64_t capacity = block + MAX_MR;  // whole microkernel tiles
  const int64_t in_stride = capacity * cin + 16, out_stride = capacity * cout + 16;
  const int64_t scratch = sr_winograd_scratch(M, a.count, a.cin, a.cout, a.threads);
  int64_t out_of_range = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) reduction(| : out_of_range)
  for (int64_t b = 0; b < blocks; b++) {
    float* in = a.scratch + omp_get_thread_num() * scratch;
    float* out = in + MATRICES * in_stride;
    const int64_t first = b * block, n = smaller(block, a.count - first);
    auto patch = [&](int64_t i) -> const int32_t* {  // upper left of the A x A cells, in rows of 6
      if (M == 4) return a.tiles + (first + i) * 36;
      const int64_t quarter = a.quarters[first + i], tile = quarter / 4;
      if (quarter < 0 || tile >= a.n_tiles) return nullptr;
      return a.tiles + tile * 36 + (quarter % 4 / 2) * 12 + (quarter % 2) * 2;
    };
    for (int64_t i = 0; i < n; i++) {
      const int32_t* cells = patch(i);
      if (!cells) {
        out_of_range = 1;
        continue;
      }
      const float* rows[MATRICES];
      SR_UNROLL for (int r = 0; r < A; r++) SR_UNROLL for (int c = 0; c < A; c++) {
        const int64_t row = cells[r * 6 + c];
        const bool present = (uint64_t)row < (uint64_t)a.n;
        rows[r * A + c] = present ? a.x + row * a.x_stride : a.zeros;
        out_of_range |= !present && row != a.n;
      }
      for (int64_t c = 0; c < a.cin; c += VL) {
        float* target = in + i * cin + c;
        const int64_t part = a.cin - c;
        if (part >= VL) transform_input<M>([&](int cell) { return load(rows[cell] + c); }, target, in_stride);
        else transform_input<M>([&](int cell) { return load_part(rows[cell] + c, part); }, target, in_stride);
      }
    }
    for (int matrix = 0; matrix < MATRICES; matrix++)
      for (int64_t p = 0; p < panels.count(); p++) {
        const int nv = panels.vectors(p);
        const int64_t rows = rows_of(nv), width = nv * VL;
        const MultiplyTile multiply = tile_function(nv);
        const float* weight = a.weight + matrix * a.cin * panels.width() + panels.offset(p, a.cin);
        float* target = out + matrix * out_stride + panels.first(p) * capacity;
        const int64_t depth = WEIGHT_FLOATS / width;
        for (int64_t k = 0; k < a.cin; k += depth)
          for (int64_t i = 0; i < n; i += rows) {
            const float* row = in + matrix * in_stride + i * cin + k;
            const float* pointers[MAX_MR];
            SR_UNROLL for (int r = 0; r < MAX_MR; r++, row += cin) pointers[r] = row;
            multiply(pointers, 1, 0, 0, smaller(depth, a.cin - k), weight + k * width, 0, target + i * width, k > 0);
          }
      }
    for (int64_t i = 0; i < n; i++) {
      const int32_t* cells = patch(i);
      if (!cells) continue;
      for (int64_t p = 0; p < panels.count(); p++) {
        const int64_t width = panels.vectors(p) * VL;
        const float* source = out + panels.first(p) * capacity + i * width;
        for (int64_t c = 0; c < panels.channels(p); c += VL) {
          vec results[M * M];
          transform_output<M>(source + c, out_stride, results);
          SR_ROLLED for (int j = 0; j < M * M; j++) {
            const int64_t row = cells[(1 + j / M) * 6 + 1 + j % M];
            if ((uint64_t)row < (uint64_t)a.n)
              finish_vector(a.epilogue, results[j], row, panels.first(p) + c, panels.channels(p) - c);
          }
        }
      }
    }
  }
  return out_of_range ? SR_TABLE_OUT_OF_RANGE : SR_OK;
}

SR_API int64_t sr_winograd(const Winograd* call) { return call->m == 2 ? convolve<2>(*call) : convolve<4>(*call); }
