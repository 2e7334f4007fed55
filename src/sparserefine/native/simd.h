// What every kernel shares: a vector of VL floats in the compiler's own vector extension (GCC, Clang), so that one source
// serves all instruction sets. VL is given by the build: 16 (AVX-512), 8 (AVX2 + FMA), 4 (SSE2, NEON).
#pragma once
#include <cstdint>
#include <cstring>

#ifndef VL
#error "VL, the floats of a vector, is given by the build (build.py)"
#endif

#define SR_API extern "C" __attribute__((visibility("default")))
#define SR_INLINE static inline __attribute__((always_inline))
#define SR_UNROLL _Pragma("GCC unroll 64")

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
// Feature rows start anywhere: unaligned, and seen through pointers to float.
typedef float vec_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

// What every entry point returns. Python turns all but OK into an exception.
enum Status { SR_OK = 0, SR_TABLE_OUT_OF_RANGE = 1, SR_SITES_INVALID = 2 };

SR_INLINE vec load(const float* p) { return *(const vec_unaligned*)p; }
SR_INLINE void store(float* p, vec v) { *(vec_unaligned*)p = v; }
SR_INLINE vec splat(float x) { return x - vec{}; }
SR_INLINE vec relu(vec v) { return v < 0.f ? vec{} : v; }  // NaN stays NaN

// The first n < VL floats; what lies behind them is neither read nor written.
SR_INLINE vec load_part(const float* p, int64_t n) {
  vec v{};
  memcpy(&v, p, n * sizeof(float));
  return v;
}
SR_INLINE void store_part(float* p, vec v, int64_t n) { memcpy(p, &v, n * sizeof(float)); }

template <class T> SR_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> SR_INLINE T larger(T a, T b) { return a > b ? a : b; }
SR_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SR_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
