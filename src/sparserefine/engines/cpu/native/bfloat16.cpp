// The primitive and the gradient of its weight in bfloat16, for training: products of pairs of channels, or of pairs of
// sites, summed in float32 by AVX512-BF16. Half of the memory and twice the products per instruction of float32.
#include "gemm.h"

struct Bf16Convolution {
  const uint16_t* x;  // [n_in, cin], cin even, rows `x_stride` elements apart
  int64_t x_stride, n_in, cin;
  const int32_t* table;  // [n, taps]
  int64_t n, taps;
  const uint16_t* weight;  // packed by sr_pack_bf16
  int64_t cout;
  const int32_t* rows;  // [n]: output row of each result; null: row n
  int64_t n_out;
  uint16_t* out;          // [n_out, cout]
  const uint16_t* zeros;  // [cin]
  int64_t threads;
};
SR_SIZE_OF(Bf16Convolution)

struct Bf16Gradient {
  const uint16_t* x;  // [n_in, cin]
  int64_t n_in, cin;
  const uint16_t* grad;  // [n, cout]
  int64_t cout;
  const int32_t* table;  // [n, taps]
  int64_t n, taps;
  float* result;   // [taps, cin, cout]
  float* scratch;  // [threads, sr_bf16_gradient_scratch]
  int64_t threads;
};
SR_SIZE_OF(Bf16Gradient)

#if VL == 16 && defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)

#define SR_BF16 __attribute__((target("avx512bf16")))

extern "C" int omp_get_thread_num(void);

static const int64_t BLOCK = 240, MOST_TAPS = 9;
constexpr int bf16_rows_of(int nv) { return nv == 1 ? 10 : 12; }

SR_API int64_t sr_bf16_runs(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
}

typedef uint16_t halves __attribute__((vector_size(2 * VL)));
typedef uint32_t words __attribute__((vector_size(4 * VL)));

// The first n <= 16 values; memory past them is not accessed.
SR_INLINE __m256i load_halves(const uint16_t* p, int64_t n) {
  if (n >= VL) return _mm256_loadu_si256((const __m256i*)p);
  uint16_t part[VL] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return _mm256_loadu_si256((const __m256i*)part);
}
SR_INLINE void store_halves(uint16_t* p, __m256i values, int64_t n) {
  if (n >= VL) return _mm256_storeu_si256((__m256i*)p, values);
  uint16_t part[VL];
  _mm256_storeu_si256((__m256i*)part, values);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

// sums [MR, NV * VL] = sum over taps and pairs of channels of rows[tap][m][pair] * weight[tap][pair][:].
template <int MR, int NV>
SR_BF16 static void multiply_pairs(const uint16_t* const* rows, int64_t taps, int64_t pairs, const uint16_t* weight,
                                   float* sums) {
  __m512 sum[MR][NV];
  SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] = _mm512_setzero_ps();
  for (int64_t t = 0; t < taps; t++) {
    const uint16_t* a[MR];
    SR_UNROLL for (int m = 0; m < MR; m++) a[m] = rows[m * taps + t];
    for (int64_t k = 0; k < pairs; k++, weight += NV * 2 * VL) {
      __m512bh w[NV];
      SR_UNROLL for (int v = 0; v < NV; v++) w[v] = (__m512bh)_mm512_loadu_si512(weight + v * 2 * VL);
      SR_UNROLL for (int m = 0; m < MR; m++) {
        int32_t two;
        memcpy(&two, a[m] + 2 * k, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
        SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], both, w[v]);
      }
    }
  }
  SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++)
    _mm512_storeu_ps(sums + (m * NV + v) * VL, sum[m][v]);
}

SR_BF16 static void store_rounded(uint16_t* out, const float* sums, int64_t n) {
  for (int64_t c = 0; c < n; c += VL)
    store_halves(out + c, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + c)), n - c);
}

SR_API int64_t sr_packed_bf16(int64_t taps, int64_t cin, int64_t cout) { return taps * cin * round_up(cout, VL); }

// [taps, cin, cout], cin even -> panels of [taps][cin / 2][width][2], padded with zeros beyond cout.
SR_API int64_t sr_pack_bf16(const uint16_t* weight, int64_t taps, int64_t cin, int64_t cout, uint16_t* packed) {
  const Panels panels(cout);
  for (int64_t p = 0; p < panels.count(); p++)
    for (int64_t k = 0; k < taps * cin; k += 2)
      for (int64_t c = 0; c < panels.vectors(p) * VL; c++)
        for (int64_t i = k; i < k + 2; i++)
          *packed++ = c < panels.channels(p) ? weight[i * cout + panels.first(p) + c] : 0;
  return SR_OK;
}

SR_API int64_t sr_convolve_bf16(const Bf16Convolution* call) {
  const Bf16Convolution& a = *call;
  const Panels panels(a.cout);
  const int64_t mr = bf16_rows_of(panels.nv), block = BLOCK / mr * mr;
  int64_t out_of_range = a.taps > MOST_TAPS;
#pragma omp parallel for schedule(dynamic, 4) num_threads(a.threads) reduction(| : out_of_range)
  for (int64_t b = 0; b < ceil_div(a.n, block); b++) {
    const uint16_t* sources[(BLOCK + MAX_MR) * MOST_TAPS];
    alignas(64) float sums[MAX_MR * 2 * VL];
    const int64_t first = b * block, n = smaller(block, a.n - first);
    if (out_of_range) continue;
    for (int64_t i = 0; i < (n + MAX_MR) * a.taps; i++) {
      const int64_t row = i < n * a.taps ? a.table[first * a.taps + i] : a.n_in;
      const bool present = (uint64_t)row < (uint64_t)a.n_in;
      out_of_range |= !present && row != a.n_in;
      sources[i] = present ? a.x + row * a.x_stride : a.zeros;
    }
    const uint16_t* weight = a.weight;
    for (int64_t p = 0; p < panels.count(); p++) {
      const int64_t nv = panels.vectors(p), rows = bf16_rows_of(nv), width = nv * VL;
      for (int64_t i = 0; i < n; i += rows) {
        const uint16_t* const* from = sources + i * a.taps;
        if (nv == 2) multiply_pairs<bf16_rows_of(2), 2>(from, a.taps, a.cin / 2, weight, sums);
        else multiply_pairs<bf16_rows_of(1), 1>(from, a.taps, a.cin / 2, weight, sums);
        for (int64_t r = 0; r < smaller(rows, n - i); r++) {
          const int64_t row = a.rows ? a.rows[first + i + r] : first + i + r;
          if ((uint64_t)row < (uint64_t)a.n_out)
            store_rounded(a.out + row * a.cout + panels.first(p), sums + r * width, panels.channels(p));
          else
            out_of_range = 1;
        }
      }
      weight += a.taps * a.cin * width;
    }
  }
  return out_of_range ? SR_TABLE_OUT_OF_RANGE : SR_OK;
}

// Sites at once, and rows of dW at once; as for float32 (gradient.cpp), each thread owns whole rows of dW.
static const int64_t CHUNK = 512;
static const int MR = 8;

// Pairs of values of two sites, for all channels of both operands, and the two lists of rows.
SR_API int64_t sr_bf16_gradient_scratch(int64_t cin, int64_t cout) {
  return CHUNK / 2 * (round_up(cin, VL) + round_up(cout, VL)) + 4 * CHUNK + 16;
}

// to [pairs, width] = (rows[2 i], rows[2 i + 1]) interleaved; `count` rows, the last pair may lack one.
static void interleave(const uint16_t* const* rows, int64_t count, int64_t channels, int64_t width, uint32_t* to) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t c = 0; c < width; c += VL, to += VL) {
      const words one = __builtin_convertvector((halves)load_halves(rows[i] + c, channels - c), words);
      words two{};
      if (i + 1 < count) two = __builtin_convertvector((halves)load_halves(rows[i + 1] + c, channels - c), words);
      _mm512_storeu_si512(to, (__m512i)(one | two << 16));
    }
}

// result [ROWS, :] += sum over pairs of sites of x[pair][row] * grad[pair][:].
template <int ROWS, int NV>
SR_BF16 static void add_outer(const uint32_t* x, int64_t x_width, const uint32_t* grad, int64_t grad_width, int64_t pairs,
                              float* result, int64_t stride, int64_t channels) {
  __m512 sum[ROWS][NV];
  SR_UNROLL for (int m = 0; m < ROWS; m++) SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; i++, x += x_width, grad += grad_width) {
    __m512bh g[NV];
    SR_UNROLL for (int v = 0; v < NV; v++) g[v] = (__m512bh)_mm512_loadu_si512(grad + v * VL);
    SR_UNROLL for (int m = 0; m < ROWS; m++) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32((int32_t)x[m]);
      SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], both, g[v]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < NV; v++) {
      float* out = result + m * stride + v * VL;
      const int64_t left = channels - v * VL;
      if (left >= VL) store(out, load(out) + (vec)sum[m][v]);
      else if (left > 0) store_part(out, load_part(out, left) + (vec)sum[m][v], left);
    }
}

template <int NV>
static void add_rows(int64_t rows, const uint32_t* x, int64_t x_width, const uint32_t* grad, int64_t grad_width,
                     int64_t pairs, float* result, int64_t stride, int64_t channels) {
  if (rows == 8) add_outer<8, NV>(x, x_width, grad, grad_width, pairs, result, stride, channels);
  else if (rows == 4) add_outer<4, NV>(x, x_width, grad, grad_width, pairs, result, stride, channels);
  else if (rows == 2) add_outer<2, NV>(x, x_width, grad, grad_width, pairs, result, stride, channels);
  else add_outer<1, NV>(x, x_width, grad, grad_width, pairs, result, stride, channels);
}

SR_API int64_t sr_weight_gradient_bf16(const Bf16Gradient* call) {
  const Bf16Gradient& a = *call;
  const int64_t x_width = round_up(a.cin, VL), grad_width = round_up(a.cout, VL), slices = ceil_div(a.cin, MR);
  int64_t out_of_range = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : out_of_range)
  {
    uint32_t* x = (uint32_t*)(a.scratch + omp_get_thread_num() * sr_bf16_gradient_scratch(a.cin, a.cout));
    uint32_t* grad = x + CHUNK / 2 * x_width;
    const uint16_t** from = (const uint16_t**)(grad + CHUNK / 2 * grad_width);
    const uint16_t** to = from + CHUNK;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.taps * a.cin; i++) memset(a.result + i * a.cout, 0, a.cout * sizeof(float));
    for (int64_t first = 0; first < a.n; first += CHUNK) {
      const int64_t n = smaller(CHUNK, a.n - first);
      int64_t tap = -1, pairs = 0;
      // No barrier between chunks: a static schedule gives each thread the same rows of dW every time.
#pragma omp for schedule(static) nowait
      for (int64_t task = 0; task < a.taps * slices; task++) {
        if (task / slices != tap) {
          tap = task / slices;
          int64_t count = 0;
          for (int64_t i = 0; i < n; i++) {
            const int64_t row = a.table[(first + i) * a.taps + tap];
            const bool present = (uint64_t)row < (uint64_t)a.n_in;
            out_of_range |= !present && row != a.n_in;
            from[count] = a.x + (present ? row : 0) * a.cin, to[count] = a.grad + (first + i) * a.cout;
            count += present;
          }
          interleave(from, count, a.cin, x_width, x);
          interleave(to, count, a.cout, grad_width, grad);
          pairs = ceil_div(count, 2);
        }
        int64_t k = task % slices * MR;
        const int64_t end = smaller(k + MR, a.cin);
        while (k < end) {
          int64_t rows = MR, c = 0;
          while (rows > end - k) rows /= 2;
          float* result = a.result + (tap * a.cin + k) * a.cout;
          for (; c + 2 * VL <= grad_width; c += 2 * VL)
            add_rows<2>(rows, x + k, x_width, grad + c, grad_width, pairs, result + c, a.cout, a.cout - c);
          if (c < grad_width)
            add_rows<1>(rows, x + k, x_width, grad + c, grad_width, pairs, result + c, a.cout, a.cout - c);
          k += rows;
        }
      }
    }
  }
  return out_of_range ? SR_TABLE_OUT_OF_RANGE : SR_OK;
}

#else

SR_API int64_t sr_bf16_runs(void) { return 0; }

#endif
