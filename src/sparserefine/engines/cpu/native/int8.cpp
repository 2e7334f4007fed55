// The primitive in 8 bits: unsigned activations (outputs of a ReLU) times signed weights, summed in int32 by AVX-512
// VNNI, four channels per instruction. The indirect GEMM is faster here than Winograd's algorithm, whose transforms
// need more than 8 bits. Quantisation steps: activations have one per channel, folded into the weights, which have one
// per output (quantisation.py).
#include "gemm.h"

struct Int8Convolution {
  const uint8_t* x;  // [n_in + 1, cin rounded up to 4], rows `x_stride` bytes apart; the last one is zero
  int64_t x_stride, n_in, cin;
  const int32_t* table;  // [n, taps]
  int64_t n, taps;
  const int8_t* weight;  // packed by sr_pack_int8
  int64_t cout;
  const int32_t* rows;  // [n]: output row of each result; null: row n
  int64_t n_out;
  const float* scale;  // [cout]: factor of the sums
  Epilogue epilogue;
  int64_t threads;
};
SR_SIZE_OF(Int8Convolution)

#if VL == 16 && defined(__AVX512F__)

#define SR_VNNI __attribute__((target("avx512vnni")))

static const int64_t BLOCK = 240, MOST_TAPS = 9;
constexpr int int8_rows_of(int nv) { return nv == 1 ? 10 : 12; }

// groups: number of groups of four channels. The sums pass through memory on their way to the epilogue: with an
// unrolled epilogue on registers, GCC would spill all sums in the inner loop.
template <int MR, int NV>
SR_VNNI static void multiply_tile(const uint8_t* x, const uint32_t* offsets, int64_t taps, int64_t groups,
                                  const int8_t* weight, int32_t* sums) {
  __m512i sum[MR][NV];
  SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] = _mm512_setzero_si512();
  for (int64_t t = 0; t < taps; t++) {
    const uint8_t* row[MR];
    SR_UNROLL for (int m = 0; m < MR; m++) row[m] = x + offsets[m * taps + t];
    for (int64_t k = 0; k < groups; k++, weight += NV * 64) {
      __m512i w[NV];
      SR_UNROLL for (int v = 0; v < NV; v++) w[v] = _mm512_loadu_si512(weight + v * 64);
      SR_UNROLL for (int m = 0; m < MR; m++) {
        int32_t four;
        memcpy(&four, row[m] + 4 * k, 4);
        const __m512i a = _mm512_set1_epi32(four);
        SR_UNROLL for (int v = 0; v < NV; v++) sum[m][v] = _mm512_dpbusd_epi32(sum[m][v], a, w[v]);
      }
    }
  }
  SR_UNROLL for (int m = 0; m < MR; m++) SR_UNROLL for (int v = 0; v < NV; v++)
    _mm512_storeu_si512(sums + (m * NV + v) * VL, sum[m][v]);
}

SR_API int64_t sr_int8_runs(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") != 0;
}

SR_API int64_t sr_packed_int8_bytes(int64_t taps, int64_t cin, int64_t cout) {
  return taps * round_up(cin, 4) * round_up(cout, VL);
}

// [taps, cin, cout] -> panels of [taps][cin / 4][width][4], padded with zeros beyond cin and cout.
SR_API int64_t sr_pack_int8(const int8_t* weight, int64_t taps, int64_t cin, int64_t cout, int8_t* packed) {
  const Panels panels(cout);
  for (int64_t p = 0; p < panels.count(); p++)
    for (int64_t t = 0; t < taps; t++)
      for (int64_t k = 0; k < cin; k += 4)
        for (int64_t c = 0; c < panels.vectors(p) * VL; c++)
          for (int64_t i = k; i < k + 4; i++) {
            const bool inside = i < cin && c < panels.channels(p);
            *packed++ = inside ? weight[(t * cin + i) * cout + panels.first(p) + c] : 0;
          }
  return SR_OK;
}

SR_API int64_t sr_convolve_int8(const Int8Convolution* call) {
  const Int8Convolution& a = *call;
  const Panels panels(a.cout);
  const int64_t mr = int8_rows_of(panels.nv), block = BLOCK / mr * mr, groups = ceil_div(a.cin, 4);
  int64_t out_of_range = a.taps > MOST_TAPS;
#pragma omp parallel for schedule(dynamic, 4) num_threads(a.threads) reduction(| : out_of_range)
  for (int64_t b = 0; b < ceil_div(a.n, block); b++) {
    uint32_t offsets[(BLOCK + MAX_MR) * MOST_TAPS];
    alignas(64) int32_t sums[MAX_MR * 2 * VL];
    const int64_t first = b * block, n = smaller(block, a.n - first);
    if (out_of_range) continue;
    for (int64_t i = 0; i < (n + MAX_MR) * a.taps; i++) {
      int64_t row = i < n * a.taps ? a.table[first * a.taps + i] : a.n_in;
      if ((uint64_t)row > (uint64_t)a.n_in) out_of_range = 1, row = a.n_in;
      offsets[i] = (uint32_t)(row * a.x_stride);
    }
    const int8_t* weight = a.weight;
    for (int64_t p = 0; p < panels.count(); p++) {
      const int64_t nv = panels.vectors(p), rows = int8_rows_of(nv), width = nv * VL;
      for (int64_t i = 0; i < n; i += rows) {
        if (nv == 2) multiply_tile<int8_rows_of(2), 2>(a.x, offsets + i * a.taps, a.taps, groups, weight, sums);
        else multiply_tile<int8_rows_of(1), 1>(a.x, offsets + i * a.taps, a.taps, groups, weight, sums);
        for (int64_t r = 0; r < smaller(rows, n - i); r++) {
          const int64_t row = a.rows ? a.rows[first + i + r] : first + i + r;
          if ((uint64_t)row >= (uint64_t)a.n_out) {
            out_of_range = 1;
            continue;
          }
          for (int64_t c = 0; c < panels.channels(p); c += VL) {
            const int64_t left = panels.channels(p) - c, channel = panels.first(p) + c;
            const vec sum = __builtin_convertvector(*(const ivec*)(sums + r * width + c), vec);
            const vec scale = left >= VL ? load(a.scale + channel) : load_part(a.scale + channel, left);
            finish_vector(a.epilogue, sum * scale, row, channel, left);
          }
        }
      }
      weight += a.taps * groups * 4 * width;
    }
  }
  return out_of_range ? SR_TABLE_OUT_OF_RANGE : SR_OK;
}

#endif
