// Tells which objects this processor can run. Only called in the generic object.
#include "simd.h"

// 1 if this processor runs the object with `floats` floats per vector.
SR_API int64_t sr_processor_runs(int64_t floats) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (floats == 16) return avx2 && avx512;
  if (floats == 8) return avx2;
#endif
  return floats == 4;
}
