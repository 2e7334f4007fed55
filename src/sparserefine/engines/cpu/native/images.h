// What kernels on images share: interpolation, sites, images, and threads that share work.
#pragma once
#include "simd.h"

extern "C" int omp_get_thread_num(void);

namespace {

constexpr float CLIP = 1e-10f;  // smallest probability

// Work items go to whichever thread is free. Results do not depend on the thread.
template <class Body> SR_INLINE void parallel(int64_t items, int64_t threads, Body body) {
  int64_t next = 0;
#pragma omp parallel num_threads(items > 1 ? threads : 1)
  {
    const int64_t thread = omp_get_thread_num();
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;) body(i, thread);
  }
}

struct Axis {  // taps of one axis: output i = lerp(x[low[i]], x[high[i]], weight[i])
  const int32_t* low;
  const int32_t* high;
  const float* weight;
  int64_t size;

  bool within(int64_t coarse) const {
    bool good = true;
    for (int64_t i = 0; i < size; i++) good &= low[i] >= 0 && low[i] < coarse && high[i] >= 0 && high[i] < coarse;
    return good;
  }
};

struct Sites {  // batch, row, column of each; Tensor.nonzero() stores them column by column
  const int32_t* coords;
  int64_t count, site_stride, column_stride;
};

struct Image {  // [batches, channels, height, width], `bytes` each; labels have one channel
  void* values;
  int64_t bytes, batches, channels, height, width;
};

}  // namespace
