// The primitive as an indirect GEMM: y[n] = sum_t x[table[n, t]] @ W[t]. The microkernel reads rows through pointers,
// so nothing is gathered into a buffer. The pointer of a missing neighbour leads to a row of zeros.
#include "gemm.h"

// Rows per block: their sums and inputs stay in the second-level cache while all weights are read.
static const int64_t BLOCK_ROWS = 240;

struct Convolution {
  const float* x;  // [n_in, cin], rows `x_stride` floats apart
  int64_t x_stride, n_in, cin;
  const int32_t* table;  // [n, taps]; null: row n reads row n (a linear layer)
  int64_t n, taps;
  const float* weight;  // packed by sr_pack
  int64_t cout;
  const int32_t* rows;  // [n]: output row of each result; null: row n
  int64_t n_out;
  Epilogue epilogue;
  const float* zeros;  // [cin]
  float* scratch;      // [threads, sr_convolution_scratch]
  int64_t threads;
};
SR_SIZE_OF(Activated)
SR_SIZE_OF(Epilogue)
SR_SIZE_OF(Convolution)

extern "C" int omp_get_thread_num(void);

static int64_t block_rows(int64_t n, int64_t mr, int64_t threads) {
  // With few rows, use smaller blocks, so that every thread gets several.
  int64_t fair = round_up(ceil_div(n, 4 * threads), mr);
  return larger(mr, smaller(BLOCK_ROWS / mr * mr, fair));
}

SR_API int64_t sr_packed_floats(int64_t taps, int64_t cin, int64_t cout) { return taps * cin * round_up(cout, VL); }

// [taps, cin, cout] -> panels.
SR_API int64_t sr_pack(const float* weight, int64_t taps, int64_t cin, int64_t cout, float* packed) {
  Panels panels(cout);
  for (int64_t p = 0; p < panels.count(); p++) {
    int64_t width = panels.vectors(p) * VL, channels = panels.channels(p);
    float* out = packed + panels.offset(p, taps * cin);
    for (int64_t k = 0; k < taps * cin; k++, out += width) {
      memcpy(out, weight + k * cout + panels.first(p), channels * sizeof(float));
      memset(out + channels, 0, (width - channels) * sizeof(float));
    }
  }
  return SR_OK;
}

// Scratch memory per thread [floats].
SR_API int64_t sr_convolution_scratch(int64_t taps) {
  int64_t pointers = (BLOCK_ROWS + MAX_MR) * taps * 2;  // two floats hold one pointer
  return round_up((BLOCK_ROWS + MAX_MR) * MAX_NV * VL + pointers, 16);
}

SR_API int64_t sr_convolve(const Convolution* call) {
  const Convolution& a = *call;
  const Panels panels(a.cout);
  const int64_t mr = rows_of(panels.nv), taps = a.taps;
  const int64_t block = block_rows(a.n, mr, a.threads), blocks = ceil_div(a.n, block);
  int64_t out_of_range = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) reduction(| : out_of_range)
  for (int64_t i = 0; i < blocks; i++) {
    float* sums = a.scratch + omp_get_thread_num() * sr_convolution_scratch(taps);
    const float** pointers = (const float**)(sums + (BLOCK_ROWS + MAX_MR) * MAX_NV * VL);
    const int64_t first = i * block, n = smaller(block, a.n - first);
    for (int64_t p = 0; p < panels.count(); p++) {
      const int64_t nv = panels.vectors(p), width = nv * VL, rows = rows_of(nv), tiles = ceil_div(n, rows);
      if (p == 0 || nv != panels.nv) {  // the last panel may be narrower, with taller tiles
        for (int64_t tile = 0; tile < tiles; tile++)
          for (int64_t m = 0; m < rows; m++) {
            const int64_t local = tile * rows + m;
            for (int64_t t = 0; t < taps; t++) {
              const float* row = a.zeros;
              if (local < n) {
                int64_t source = a.table ? a.table[(first + local) * taps + t] : first + local;
                if ((uint64_t)source < (uint64_t)a.n_in) row = a.x + source * a.x_stride;
                else out_of_range |= source != a.n_in;
              }
              pointers[(tile * taps + t) * rows + m] = row;
            }
          }
      }
      const MultiplyTile multiply = tile_function(nv);
      const float* weight = a.weight + panels.offset(p, taps * a.cin);
      // Several whole taps at once, or part of one tap.
      const int64_t at_once = larger<int64_t>(1, WEIGHT_FLOATS / width);
      const int64_t group = larger<int64_t>(1, at_once / larger<int64_t>(1, a.cin));
      const int64_t depth = smaller(a.cin, at_once);
      for (int64_t t = 0; t < taps; t += group)
        for (int64_t k = 0; k < a.cin; k += depth)
          for (int64_t tile = 0; tile < tiles; tile++)
            multiply(pointers + (tile * taps + t) * rows, smaller(group, taps - t), rows, k, smaller(depth, a.cin - k),
                     weight + (t * a.cin + k) * width, a.cin * width, sums + tile * rows * width, t + k > 0);
      for (int64_t r = 0; r < n; r++) {
        int64_t row = a.rows ? a.rows[first + r] : first + r;
        if ((uint64_t)row < (uint64_t)a.n_out)
          finish_row(a.epilogue, sums + r * width, row, panels.first(p), panels.channels(p));
        else
          out_of_range = 1;
      }
    }
  }
  return out_of_range ? SR_TABLE_OUT_OF_RANGE : SR_OK;
}
