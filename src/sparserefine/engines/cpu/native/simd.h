// Shared by all kernels: a vector of VL floats in the vector extension of GCC and Clang, so that one source serves all
// instruction sets. The build sets VL: 16 (AVX-512), 8 (AVX2 + FMA) or 4 (SSE2, NEON).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef VL
#error "VL, the floats of a vector, is given by the build (build.py)"
#endif

#define SR_API extern "C" __attribute__((visibility("default")))
// Tells Python the size of a structure that it fills (structures.py). Python compares it when it loads the object.
#define SR_SIZE_OF(structure) \
  SR_API int64_t sr_size_of_##structure() { return sizeof(structure); }
#define SR_INLINE static inline __attribute__((always_inline))
#define SR_UNROLL _Pragma("GCC unroll 64")
#define SR_ROLLED _Pragma("GCC unroll 1")

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
// Feature rows may start anywhere: unaligned, and accessed through pointers to float.
typedef float vec_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

// The result of every entry point. Python raises an exception for all except OK.
enum Status { SR_OK = 0, SR_TABLE_OUT_OF_RANGE = 1, SR_SITES_INVALID = 2 };

SR_INLINE vec load(const float* p) { return *(const vec_unaligned*)p; }
SR_INLINE void store(float* p, vec v) { *(vec_unaligned*)p = v; }
SR_INLINE vec splat(float x) { return x - vec{}; }
// The larger of both; b if either is NaN. One instruction, which compilers do not generate for a comparison of vectors.
// (GCC 12 warns about its own _mm512_max_ps; the masked form with all lanes compiles to the same instruction.)
#if VL == 16 && defined(__AVX512F__)
SR_INLINE vec larger_of(vec a, vec b) { return (vec)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b); }
#elif VL == 8 && defined(__AVX2__)
SR_INLINE vec larger_of(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#elif VL == 4 && defined(__SSE2__)
SR_INLINE vec larger_of(vec a, vec b) { return (vec)_mm_max_ps((__m128)a, (__m128)b); }
#else
SR_INLINE vec larger_of(vec a, vec b) { return a > b ? a : b; }
#endif
SR_INLINE vec relu(vec v) { return larger_of(vec{}, v); }  // NaN stays NaN

// Load and store the first n <= VL floats; memory past them is not accessed. The vector extension has no masks, and a
// copy of variable length would take longer than all arithmetic on a row of few channels. Sanitizers do not see accesses
// with masks: with SR_NO_MASKS (tests/sanitize.py) all instruction sets have the plain ones.
#if VL == 16 && defined(__AVX512F__) && !defined(SR_NO_MASKS)
SR_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
SR_INLINE vec load_part(const float* p, int64_t n) { return (vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
SR_INLINE void store_part(float* p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
#elif VL == 8 && defined(__AVX2__) && !defined(SR_NO_MASKS)
SR_INLINE __m256i first_lanes(int64_t n) {
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(lane < (int32_t)n);
}
SR_INLINE vec load_part(const float* p, int64_t n) { return (vec)_mm256_maskload_ps(p, first_lanes(n)); }
SR_INLINE void store_part(float* p, vec v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#else
SR_INLINE vec load_part(const float* p, int64_t n) {
  vec v{};
  for (int i = 0; i < VL; i++)
    if (i < n) v[i] = p[i];
  return v;
}
SR_INLINE void store_part(float* p, vec v, int64_t n) {
  for (int i = 0; i < VL; i++)
    if (i < n) p[i] = v[i];
}
#endif

template <class T> SR_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> SR_INLINE T larger(T a, T b) { return a > b ? a : b; }
SR_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SR_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
