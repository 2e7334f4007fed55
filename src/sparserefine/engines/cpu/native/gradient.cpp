// Gradient of the weight: dW[t] = sum_n outer(x[table[n, t]], grad[n]). Each thread owns whole rows of dW and visits
// all sites. There are no partial sums to add up, so the result has the same bits for every number of threads. (The
// gradient of the input is the primitive itself with the transposed table.)
#include "simd.h"

struct WeightGradient {
  const float* x;  // [n_in, cin]
  int64_t n_in, cin;
  const float* grad;  // [n, cout]
  int64_t cout;
  const int32_t* table;  // [n, taps]
  int64_t n, taps;
  float* result;   // [taps, cin, cout]
  float* scratch;  // [threads, sr_weight_gradient_scratch]
  int64_t threads;
};
SR_SIZE_OF(WeightGradient)

extern "C" int omp_get_thread_num(void);

// Sites at once: their gradients stay in the second-level cache while all taps and channels use them.
static const int64_t CHUNK = 512;
static const int MR = 8;

SR_API int64_t sr_weight_gradient_scratch(int64_t cout) { return CHUNK * (round_up(cout, VL) + 4) + 16; }

// sum[m][:] += x[pair][m] * grad[pair][:] over the pairs of rows.
template <int ROWS, int NV>
static void add_outer(const float* const* x, const float* const* grad, int64_t pairs, int64_t k, int64_t c, float* result,
                      int64_t stride, int64_t channels) {
  vec sum[ROWS][NV]{};
  for (int64_t i = 0; i < pairs; i++) {
    const float *a = x[i] + k, *g = grad[i] + c;
    vec b[NV];
    SR_UNROLL for (int v = 0; v < NV; v++) b[v] = load(g + v * VL);
    SR_UNROLL for (int m = 0; m < ROWS; m++) SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] += a[m] * b[v];
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < NV; v++) {
      float* out = result + (k + m) * stride + c + v * VL;
      const int64_t left = channels - c - v * VL;
      if (left >= VL) store(out, load(out) + sum[m][v]);
      else if (left > 0) store_part(out, load_part(out, left) + sum[m][v], left);
    }
}

template <int NV>
SR_INLINE void add_rows(int64_t rows, const float* const* x, const float* const* grad, int64_t pairs, int64_t k, int64_t c,
                        float* result, int64_t stride, int64_t channels) {
  if (rows == 8) add_outer<8, NV>(x, grad, pairs, k, c, result, stride, channels);
  else if (rows == 4) add_outer<4, NV>(x, grad, pairs, k, c, result, stride, channels);
  else if (rows == 2) add_outer<2, NV>(x, grad, pairs, k, c, result, stride, channels);
  else add_outer<1, NV>(x, grad, pairs, k, c, result, stride, channels);
}

SR_API int64_t sr_weight_gradient(const WeightGradient* call) {
  const WeightGradient& a = *call;
  const int64_t width = round_up(a.cout, VL), slices = ceil_div(a.cin, MR);
  int64_t out_of_range = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : out_of_range)
  {
    float* padded = a.scratch + omp_get_thread_num() * sr_weight_gradient_scratch(a.cout);
    const float** from = (const float**)(padded + CHUNK * width);
    const float** to = from + CHUNK;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.taps * a.cin; i++) memset(a.result + i * a.cout, 0, a.cout * sizeof(float));
    for (int64_t first = 0; first < a.n; first += CHUNK) {
      const int64_t n = smaller(CHUNK, a.n - first);
      for (int64_t i = 0; i < n; i++) {  // whole vectors of channels
        memcpy(padded + i * width, a.grad + (first + i) * a.cout, a.cout * sizeof(float));
        memset(padded + i * width + a.cout, 0, (width - a.cout) * sizeof(float));
      }
      int64_t tap = -1, pairs = 0;
      // No barrier between chunks: a static schedule gives each thread the same rows of dW every time.
#pragma omp for schedule(static) nowait
      for (int64_t task = 0; task < a.taps * slices; task++) {
        if (task / slices != tap) {
          tap = task / slices, pairs = 0;
          for (int64_t i = 0; i < n; i++) {
            const int64_t row = a.table[(first + i) * a.taps + tap];
            const bool present = (uint64_t)row < (uint64_t)a.n_in;
            out_of_range |= !present && row != a.n_in;
            from[pairs] = a.x + (present ? row : 0) * a.cin, to[pairs] = padded + i * width;
            pairs += present;
          }
        }
        float* result = a.result + tap * a.cin * a.cout;
        int64_t k = task % slices * MR;
        const int64_t end = smaller(k + MR, a.cin);
        while (k < end) {
          int64_t rows = MR;
          while (rows > end - k) rows /= 2;
          int64_t c = 0;
          for (; c + 2 * VL <= width; c += 2 * VL) add_rows<2>(rows, from, to, pairs, k, c, result, a.cout, a.cout);
          if (c < width) add_rows<1>(rows, from, to, pairs, k, c, result, a.cout, a.cout);
          k += rows;
        }
      }
    }
  }
  return out_of_range ? SR_TABLE_OUT_OF_RANGE : SR_OK;
}
