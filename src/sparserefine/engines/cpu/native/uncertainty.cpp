// Labels and entropy of upsampled coarse logits in one pass, and access to images at the sites.
// images/uncertainty.py defines the results.
#include "images.h"
#include "transcendental.h"

namespace {

constexpr int64_t UNROLLED = 2;             // vectors of pixels at once: hides the latency of max over classes
constexpr int64_t BLOCK = UNROLLED * VL;    // pixels
constexpr int64_t BAND = 64;                // full-resolution rows per work item
constexpr int64_t MAX_TILE = 512;           // full-resolution columns per work item
constexpr int64_t TILE_FLOATS = 4096;       // per upsampled coarse row: two of them fit the first-level cache
constexpr int64_t CHUNK = 512;              // sites per work item
enum Outputs { LOGITS = 0, SCORES = 1, MARGIN = 2 };

// ---- uncertainty of a whole image

struct Coarse {
  const float* values;  // [classes, height, width]
  int64_t classes, height, width;
};

int64_t tile_width(int64_t classes) {
  const int64_t fitting = TILE_FLOATS / classes / 64 * 64;
  return smaller(larger(fitting, (int64_t)64), MAX_TILE);
}

int64_t scratch_floats(int64_t classes) { return round_up(classes * (2 * tile_width(classes) + BLOCK), 16); }

// The first coarse column that each vector of a tile reads, if one vector holds all that it reads; otherwise -1.
void find_windows(const Axis& columns, int64_t coarse, int64_t start, int64_t count, int32_t* first) {
  for (int64_t v = 0; v < round_up(count, BLOCK) / VL; v++) {
    first[v] = -1;
#if VL > 4 && !defined(__clang__)  // needs a one-instruction shuffle by an index vector
    if (v * VL + VL > count || coarse < VL) continue;
    int32_t least = INT32_MAX, most = 0;
    for (int64_t i = start + v * VL; i < start + v * VL + VL; i++) {
      least = smaller(least, smaller(columns.low[i], columns.high[i]));
      most = larger(most, larger(columns.low[i], columns.high[i]));
    }
    if (most - least < VL) first[v] = smaller(least, (int32_t)(coarse - VL));
#else
    (void)columns, (void)coarse, (void)start;
#endif
  }
}

// Interpolates one coarse row of all classes along x: [blocks, classes, BLOCK], with the classes of a block adjacent.
void widen(const Coarse& coarse, int64_t row, const Axis& columns, int64_t start, int64_t count, const int32_t* first,
           float* wide) {
  const int64_t vectors = round_up(count, BLOCK) / VL;
  for (int64_t k = 0; k < coarse.classes; k++) {
    const float* source = coarse.values + (k * coarse.height + row) * coarse.width;
    for (int64_t v = 0; v < vectors; v++) {
      float* out = wide + ((v / UNROLLED * coarse.classes + k) * UNROLLED + v % UNROLLED) * VL;
      const int64_t x = start + v * VL;
#if VL > 4 && !defined(__clang__)
      if (first[v] >= 0) {
        ivec low, high;
        memcpy(&low, columns.low + x, sizeof low);
        memcpy(&high, columns.high + x, sizeof high);
        const vec window = load(source + first[v]);
        const vec a = __builtin_shuffle(window, low - first[v]), b = __builtin_shuffle(window, high - first[v]);
        store(out, a + load(columns.weight + x) * (b - a));
        continue;
      }
#else
      (void)first;
#endif
      for (int64_t i = 0; i < VL; i++) {
        float value = 0;  // beyond the tile: never stored
        if (v * VL + i < count) {
          const float a = source[columns.low[x + i]], b = source[columns.high[x + i]];
          value = a + columns.weight[x + i] * (b - a);
        }
        out[i] = value;
      }
    }
  }
}

struct Pixels {
  ivec label[UNROLLED];
  vec entropy[UNROLLED];
};

struct Largest {
  ivec label[UNROLLED];
  vec value[UNROLLED], sum[UNROLLED];
};

// Interpolates along y into z [classes, BLOCK]. Also finds the first class of the largest value, and the sum.
SR_INLINE Largest interpolate(const float* upper, const float* lower, float weight, int64_t classes, float* z) {
  Largest most;
  for (int64_t u = 0; u < UNROLLED; u++)
    most.label[u] = ivec{}, most.value[u] = splat(-__builtin_inff()), most.sum[u] = vec{};
  for (int64_t k = 0; k < classes; k++) {
    const ivec label = (int32_t)k - ivec{};
    for (int64_t u = 0; u < UNROLLED; u++) {
      const int64_t at = k * BLOCK + u * VL;
      const vec a = load(upper + at), b = load(lower + at), value = a + weight * (b - a);
      store(z + at, value);
      most.sum[u] += value;
      most.label[u] = value > most.value[u] ? label : most.label[u];
      most.value[u] = value > most.value[u] ? value : most.value[u];
    }
  }
  return most;
}

// H = log T - sum(s e) / T with s = z - max z, e = exp s, T = sum e.
SR_INLINE Pixels of_logits(const float* upper, const float* lower, float weight, int64_t classes, float* z) {
  const Largest most = interpolate(upper, lower, weight, classes, z);
  vec total[UNROLLED]{}, dot[UNROLLED]{};
  for (int64_t k = 0; k < classes; k++)
    for (int64_t u = 0; u < UNROLLED; u++) {
      const vec difference = load(z + k * BLOCK + u * VL) - most.value[u];
      const vec s = difference < LOWEST ? splat(LOWEST) : difference;
      const vec e = exp_of(s);
      total[u] += e;
      dot[u] += s * e;
    }
  Pixels result;
  for (int64_t u = 0; u < UNROLLED; u++) {
    result.label[u] = most.label[u];
    result.entropy[u] = relu(log_of(total[u]) - dot[u] / total[u]);
  }
  return result;
}

// H = log T - sum(p log p) / T, where p are the clipped shares and T = sum p, above 1 because of clipping.
SR_INLINE Pixels of_scores(const float* upper, const float* lower, float weight, int64_t classes, float* z) {
  const Largest most = interpolate(upper, lower, weight, classes, z);
  // Shares are z * scale + none. If the sum is not positive, they are 1 / K. The reciprocal of a denormal sum
  // would overflow.
  vec scale[UNROLLED], none[UNROLLED], total[UNROLLED]{}, dot[UNROLLED]{};
  for (int64_t u = 0; u < UNROLLED; u++) {
    const vec sum = most.sum[u];
    scale[u] = sum > 0.f ? 1.f / (sum < 1e-37f ? splat(1e-37f) : sum) : vec{};
    none[u] = sum > 0.f ? vec{} : splat(1.f / classes);
  }
  for (int64_t k = 0; k < classes; k++)
    for (int64_t u = 0; u < UNROLLED; u++) {
      const vec value = load(z + k * BLOCK + u * VL) * scale[u] + none[u];
      const vec share = value < CLIP ? splat(CLIP) : value;
      total[u] += share;
      dot[u] += share * log_of(share);
    }
  Pixels result;
  for (int64_t u = 0; u < UNROLLED; u++) {
    result.label[u] = most.sum[u] > 0.f ? most.label[u] : ivec{};
    result.entropy[u] = relu(log_of(total[u]) - dot[u] / total[u]);
  }
  return result;
}

// Two classes, m = z1 - z0: H = log(1 + e) + |m| e / (1 + e) with e = exp(-|m|).
SR_INLINE Pixels of_margin(const float* upper, const float* lower, float weight) {
  Pixels result;
  for (int64_t u = 0; u < UNROLLED; u++) {
    const vec a = load(upper + u * VL), b = load(lower + u * VL), margin = a + weight * (b - a);
    const vec s = margin > 0.f ? -margin : margin, clamped = s < LOWEST ? splat(LOWEST) : s;
    const vec e = exp_of(clamped), total = 1.f + e, lost = e - (total - 1.f);  // what rounding 1 + e loses
    result.label[u] = margin > 0.f ? 1 - ivec{} : ivec{};
    result.entropy[u] = relu(log_of(total) + (lost - clamped * e) / total);
  }
  return result;
}

template <class Label> SR_INLINE void store_labels(Label* out, ivec label, int64_t n) {
  typedef Label narrow __attribute__((vector_size(VL * sizeof(Label))));
  const narrow values = __builtin_convertvector(label, narrow);
  if (n >= VL) memcpy(out, &values, sizeof values);
  else memcpy(out, &values, larger(n, (int64_t)0) * sizeof(Label));
}

// One work item: a range of rows and columns.
template <Outputs OUTPUTS, class Label>
void tile(const Coarse& coarse, const Axis& rows, const Axis& columns, int64_t top, int64_t start, Label* labels,
          float* entropies, float* scratch) {
  const int64_t width = tile_width(coarse.classes), count = smaller(width, columns.size - start);
  const int64_t bottom = smaller(top + BAND, rows.size);
  int32_t first[MAX_TILE / VL];
  find_windows(columns, coarse.width, start, count, first);
  float *upper = scratch, *lower = upper + width * coarse.classes, *z = lower + width * coarse.classes;
  int64_t upper_row = -1, lower_row = -1;  // the coarse rows that these hold
  for (int64_t y = top; y < bottom; y++) {
    const int64_t low = rows.low[y], high = rows.high[y];
    if (upper_row != low) {  // usually the previous lower row
      float* const other = upper;
      const int64_t other_row = upper_row;
      upper = lower, upper_row = lower_row;
      lower = other, lower_row = other_row;
    }
    if (upper_row != low) widen(coarse, upper_row = low, columns, start, count, first, upper);
    if (high != low && lower_row != high) widen(coarse, lower_row = high, columns, start, count, first, lower);
    const float *above = upper, *below = high == low ? upper : lower;
    for (int64_t x = 0; x < count; x += BLOCK) {
      const int64_t at = x * coarse.classes;
      Pixels pixels;
      if (OUTPUTS == MARGIN) pixels = of_margin(above + at, below + at, rows.weight[y]);
      if (OUTPUTS == LOGITS) pixels = of_logits(above + at, below + at, rows.weight[y], coarse.classes, z);
      if (OUTPUTS == SCORES) pixels = of_scores(above + at, below + at, rows.weight[y], coarse.classes, z);
      for (int64_t u = 0; u < UNROLLED; u++) {
        const int64_t out = y * columns.size + start + x + u * VL, n = count - x - u * VL;
        if (n <= 0) break;
        store_labels(labels + out, pixels.label[u], n);
        if (n >= VL) store(entropies + out, pixels.entropy[u]);
        else store_part(entropies + out, pixels.entropy[u], n);
      }
    }
  }
}

template <Outputs OUTPUTS, class Label>
void all_tiles(const Coarse& coarse, const Axis& rows, const Axis& columns, Label* labels, float* entropies,
               float* scratch, int64_t threads) {
  const int64_t width = tile_width(coarse.classes), across = ceil_div(columns.size, width);
  const int64_t each = scratch_floats(coarse.classes);
  parallel(across * ceil_div(rows.size, BAND), threads, [&](int64_t item, int64_t thread) {
    tile<OUTPUTS>(coarse, rows, columns, item / across * BAND, item % across * width, labels, entropies,
                  scratch + thread * each);
  });
}

// ---- at the sites

SR_INLINE bool inside(int64_t i, int64_t size) { return (uint64_t)i < (uint64_t)size; }

// Calls body(site, batch, row, column) for all sites. Skips sites outside and then returns SR_SITES_INVALID.
template <class Body>
SR_INLINE int64_t each_site(const Sites& sites, int64_t first_batch, int64_t batches, int64_t height, int64_t width,
                            int64_t threads, Body body) {
  int64_t status = SR_OK;
  parallel(ceil_div(sites.count, CHUNK), threads, [&](int64_t item, int64_t) {
    const int64_t end = smaller((item + 1) * CHUNK, sites.count);
    for (int64_t i = item * CHUNK; i < end; i++) {
      const int32_t* site = sites.coords + i * sites.site_stride;
      const int64_t b = site[0] - first_batch, r = site[sites.column_stride], c = site[2 * sites.column_stride];
      if (inside(b, batches) && inside(r, height) && inside(c, width)) body(i, b, r, c);
      else __atomic_store_n(&status, (int64_t)SR_SITES_INVALID, __ATOMIC_RELAXED);
    }
  });
  return status;
}

// Scores of one site -> log of their clipped shares; uniform if their sum is not positive.
SR_INLINE void log_shares(float* row, int64_t classes) {
  float total = 0;
  for (int64_t k = 0; k < classes; k++) total += row[k];
  for (int64_t k = 0; k < classes; k += VL) {
    const int64_t n = smaller(classes - k, (int64_t)VL);
    const vec share = total > 0 ? load_part(row + k, n) / total : splat(1.f / classes);
    store_part(row + k, log_of(share < CLIP ? splat(CLIP) : share), n);
  }
}

// values[site, channel] = image[batch, channel, row, column] * scale[channel] + shift[channel]
template <class T>
int64_t gather(const Image& image, const Sites& sites, const float* scale, const float* shift, float* values,
               int64_t threads) {
  const int64_t channels = image.channels, plane = image.height * image.width;
  return each_site(sites, 0, image.batches, image.height, image.width, threads,
                   [&](int64_t i, int64_t b, int64_t r, int64_t c) {
                     const T* pixel = (const T*)image.values + b * channels * plane + r * image.width + c;
                     for (int64_t k = 0; k < channels; k++)
                       values[i * channels + k] = pixel[k * plane] * scale[k] + shift[k];
                   });
}

template <class Label>
int64_t scatter(const float* logits, int64_t classes, const Sites& sites, const Image& labels, int64_t threads) {
  return each_site(sites, 0, labels.batches, labels.height, labels.width, threads,
                   [&](int64_t i, int64_t b, int64_t r, int64_t c) {
                     const float* row = logits + i * classes;
                     float most = row[0];
                     int32_t label = 0;
                     for (int32_t k = 1; k < classes; k++) {
                       // Not `better ? k : label`: compilers turn that into a branch, which no processor predicts.
                       label ^= (label ^ k) & -(int32_t)(row[k] > most);
                       most = row[k] > most ? row[k] : most;
                     }
                     ((Label*)labels.values)[(b * labels.height + r) * labels.width + c] = (Label)label;
                   });
}

}  // namespace

SR_SIZE_OF(Axis)
SR_SIZE_OF(Sites)
SR_SIZE_OF(Image)

// Scratch memory per thread of sr_uncertainty [floats].
SR_API int64_t sr_uncertainty_scratch(int64_t classes) { return scratch_floats(classes); }

// coarse [classes, h, w] -> labels (label_bytes 1: uint8, 2: int16) and entropies, both [height, width].
// outputs: 0 logits, 1 scores, 2 the difference of two classes' logits (classes = 1).
SR_API int64_t sr_uncertainty(const float* coarse, int64_t classes, int64_t h, int64_t w, const Axis* rows,
                              const Axis* columns, int64_t outputs, void* labels, int64_t label_bytes,
                              float* entropies, float* scratch, int64_t threads) {
  if (!rows->within(h) || !columns->within(w)) return SR_TABLE_OUT_OF_RANGE;
  const auto run = [&](auto tiles, auto* out) {
    tiles({coarse, classes, h, w}, *rows, *columns, out, entropies, scratch, threads);
  };
  if (outputs == MARGIN) run(all_tiles<MARGIN, uint8_t>, (uint8_t*)labels);
  else if (outputs == SCORES && label_bytes == 1) run(all_tiles<SCORES, uint8_t>, (uint8_t*)labels);
  else if (outputs == SCORES) run(all_tiles<SCORES, int16_t>, (int16_t*)labels);
  else if (label_bytes == 1) run(all_tiles<LOGITS, uint8_t>, (uint8_t*)labels);
  else run(all_tiles<LOGITS, int16_t>, (int16_t*)labels);
  return SR_OK;
}

// cells [h * w, classes] of image `batch` -> logits [sites, classes]. All sites must belong to that image.
SR_API int64_t sr_sample(const float* cells, int64_t classes, int64_t h, int64_t w, const Axis* rows,
                         const Axis* columns, int64_t scores, int64_t batch, const Sites* sites, float* logits,
                         int64_t threads) {
  if (!rows->within(h) || !columns->within(w)) return SR_TABLE_OUT_OF_RANGE;
  return each_site(*sites, batch, 1, rows->size, columns->size, threads,
                   [&](int64_t i, int64_t, int64_t r, int64_t c) {
    const float* above = cells + rows->low[r] * w * classes;
    const float* below = cells + rows->high[r] * w * classes;
    const int64_t left = columns->low[c] * classes, right = columns->high[c] * classes;
    const float across = columns->weight[c], down = rows->weight[r];
    float* out = logits + i * classes;
    // The last vector overlaps the one before, so that no partial vector is needed.
    for (int64_t k = 0; classes >= VL && k < classes; k += VL) {
      const int64_t at = smaller(k, classes - VL);
      const vec a = load(above + left + at), b = load(above + right + at), upper = a + across * (b - a);
      const vec d = load(below + left + at), e = load(below + right + at), lower = d + across * (e - d);
      store(out + at, upper + down * (lower - upper));
    }
    for (int64_t k = 0; classes < VL && k < classes; k++) {
      const float a = above[left + k], upper = a + across * (above[right + k] - a);
      const float b = below[left + k], lower = b + across * (below[right + k] - b);
      out[k] = upper + down * (lower - upper);
    }
    if (scores) log_shares(out, classes);
  });
}

// image of uint8 or float32 -> values [sites, channels], float32: value * scale[channel] + shift[channel].
SR_API int64_t sr_gather_normalised(const Image* image, const Sites* sites, const float* scale, const float* shift,
                                    float* values, int64_t threads) {
  if (image->bytes == 1) return gather<uint8_t>(*image, *sites, scale, shift, values, threads);
  return gather<float>(*image, *sites, scale, shift, values, threads);
}

// Writes the first class of the largest logit into labels (uint8 or int16) at the sites. Other labels stay.
SR_API int64_t sr_scatter(const float* logits, int64_t classes, const Sites* sites, const Image* labels,
                          int64_t threads) {
  if (labels->bytes == 1) return scatter<uint8_t>(logits, classes, *sites, *labels, threads);
  return scatter<int16_t>(logits, classes, *sites, *labels, threads);
}
