// exp and log of a vector of floats.
#pragma once
#include "simd.h"

typedef uint32_t uvec __attribute__((vector_size(VL * 4)));

SR_INLINE uvec bits_of(vec v) { return (uvec)v; }

// exp(x) for x <= 0. Returns 0 below -87.7 and exactly 1 at 0. Relative error below 2e-7.
SR_INLINE vec exp_of(vec x) {
  // Rounds to an integer in the low bits of the sum, which then include the exponent's bias.
  const float round = 12582912.f + 127;
  const vec n = x * 1.44269504f + round;
  const vec whole = n - round;
  const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts; the first has few bits
  vec p = splat(8.29022959e-3f);
  p = p * r + 4.18983907e-2f;
  p = p * r + 0.166676401f;
  p = p * r + 0.499991461f;
  p = p * r + 0.999999705f;
  p = p * r + 1.f;
  return p * (vec)(bits_of(n) << 23);
}
constexpr float LOWEST = -88.1f;  // exp_of is 0 here, and its argument still in range

// log(x) for normal x > 0. NaN stays NaN. Relative error below 2e-7.
SR_INLINE vec log_of(vec x) {
  const uint32_t root_half = 0x3f3504f3;
  const uvec exponent = (bits_of(x) - root_half) & 0xff800000u;
  const vec f = (vec)(bits_of(x) - exponent) - 1.f;
  const vec e = __builtin_convertvector((ivec)exponent >> 23, vec);
  vec p = splat(8.73487059e-2f);
  p = p * f - 0.143075429f;
  p = p * f + 0.149179728f;
  p = p * f - 0.165705051f;
  p = p * f + 0.199620719f;
  p = p * f - 0.250017554f;
  p = p * f + 0.333339502f;
  p = p * f - 0.499999916f;
  const vec y = e * 0.693359375f + (f + (p * (f * f) - e * 2.12194440e-4f));
  return x == x ? y : x;
}
