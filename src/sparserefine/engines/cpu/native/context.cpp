// Mean channels and probabilities of the blocks of pixels that the cells of each level cover.
// engines/reference/context.py defines the results.
//
// Only blocks of the coarsest level that hold a cell of any level are looked at, each pixel once. A block is walked in
// Z order: the sums of a cell are those of its four children. In this order the columns of any row of cells ascend, so
// a cursor for each row says which of its cells is next.
#include "images.h"
#include "transcendental.h"

namespace {

struct Level {
  Sites cells;   // of one image, sorted by row and column
  float* means;  // [count, channels + classes]
};

struct BlockMeans {
  const float* coarse;  // [height, width, classes], logits or scores of one image
  int64_t classes, height, width, scores;
  Axis rows, columns;
  const void* image;  // [channels, rows.size, columns.size], uint8 (bytes 1) or float32
  int64_t bytes, channels;
  const uint8_t* valid;  // [rows.size, columns.size]; null: all pixels count
  const float* scale;
  const float* shift;  // [channels]
  const Level* levels;
  int64_t count;     // of levels
  float* floats;     // scratch, block_means_floats(...) for each thread
  int64_t* cursors;  // scratch, block_means_cursors(...) for each thread
  int64_t threads;
};

constexpr float NO_CLASS = -3e38f;  // logit of the lanes of a vector past the last class
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

// Sums of a cell: of the probabilities, in whole vectors, then of the image's channels, and the pixels that count.
int64_t sums_of(int64_t classes, int64_t channels) { return round_up(classes, VL) + round_up(channels + 1, VL); }

int64_t cursors_of(int64_t levels) { return (int64_t)3 << levels; }

// A vector with the result for all lanes in each lane.
template <class Both> SR_INLINE vec over_lanes(vec v, Both both) {
#if defined(__clang__)
  float result = v[0];
  for (int i = 1; i < VL; i++) result = both(splat(result), splat(v[i]))[0];
  return splat(result);
#else
  ivec lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  SR_UNROLL
  for (int step = VL / 2; step > 0; step /= 2) v = both(v, __builtin_shuffle(v, lane ^ step));
  return v;
#endif
}
SR_INLINE vec largest_of(vec v) {
  return over_lanes(v, [](vec a, vec b) { return larger_of(a, b); });
}
SR_INLINE vec sum_of(vec v) {
  return over_lanes(v, [](vec a, vec b) { return a + b; });
}

// RGB: the image has three channels, whose sums and the count are one quad.
template <class T, bool SCORES, bool RGB> struct Walk {
  const BlockMeans& call;
  const int64_t strip, coarsest, height, width, classes, channels, padded, sums;
  const vec absent;     // of the last vector: 0 in the lanes of classes, NO_CLASS in those past the last class
  float* const own;     // of each level, the sums of the cell that is walked; then those of a pixel
  int64_t* const next;  // of each row of cells: the next cell
  int64_t* const end;   // behind the last one
  int64_t* const ahead; // its column; INT64_MAX behind the last one
  bool good = true;

  Walk(const BlockMeans& call, int64_t strip, int64_t thread)
      : call(call), strip(strip), coarsest(call.count - 1), height(call.rows.size), width(call.columns.size),
        classes(call.classes), channels(RGB ? 3 : call.channels), padded(round_up(classes, VL)),
        sums(sums_of(classes, channels)), absent(past_the_last()),
        own(call.floats + thread * (call.count + 1) * sums), next(call.cursors + thread * cursors_of(call.count)),
        end(next + ((int64_t)2 << coarsest)), ahead(end + ((int64_t)2 << coarsest)) {}

  vec past_the_last() const {
    vec v{};
    for (int64_t i = 0; i < VL; i++)
      if (padded - VL + i >= classes) v[i] = NO_CLASS;
    return v;
  }

  const int32_t* cell(int64_t level, int64_t i) const {
    return call.levels[level].cells.coords + i * call.levels[level].cells.site_stride;
  }
  int64_t row(int64_t level, int64_t i) const { return cell(level, i)[call.levels[level].cells.column_stride]; }
  int64_t column(int64_t level, int64_t i) const { return cell(level, i)[2 * call.levels[level].cells.column_stride]; }

  // Number of the cursor of a row of cells in this strip; rows of the coarsest level come first.
  int64_t cursor(int64_t level, int64_t r) const {
    const int64_t rows = (int64_t)1 << (coarsest - level);
    return rows - 1 + (r & (rows - 1));
  }

  // The first cell of the row, or of a later one.
  int64_t first_of(int64_t level, int64_t r) const {
    int64_t low = 0, high = call.levels[level].cells.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row(level, middle) < r) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  template <class Body> void each_row(Body body) {
    for (int64_t level = 0; level <= coarsest; level++)
      for (int64_t i = 0; i < (int64_t)1 << (coarsest - level); i++) body(level, (strip << (coarsest - level)) + i);
  }

  // Walks all blocks of the strip that hold a cell. Returns the number of cells.
  int64_t run() {
    int64_t found = 0;
    each_row([&](int64_t level, int64_t r) {
      const int64_t at = cursor(level, r);
      next[at] = first_of(level, r), end[at] = first_of(level, r + 1);
      look_ahead(level, at);
      found += larger(end[at] - next[at], (int64_t)0);
    });
    for (int64_t block = 0; block << coarsest < width; block++) {
      int64_t nearest = INT64_MAX;
      each_row([&](int64_t level, int64_t r) {
        nearest = smaller(nearest, ahead[cursor(level, r)] >> (coarsest - level));
      });
      if (nearest < block || nearest >= ceil_div(width, (int64_t)1 << coarsest)) break;  // none, or not as they must be
      block = nearest;
      clear(own + coarsest * sums);
      walk(coarsest, strip, block);
    }
    each_row([&](int64_t level, int64_t r) { good &= next[cursor(level, r)] >= end[cursor(level, r)]; });
    return found;
  }

  void look_ahead(int64_t level, int64_t at) {
    ahead[at] = next[at] < end[at] ? column(level, next[at]) : INT64_MAX;
  }

  void clear(float* into) const {
    for (int64_t i = 0; i < sums; i += VL) store(into + i, vec{});
  }

  // Adds up the pixels of a cell in its sums, which are clear. The cell begins inside the image.
  void walk(int64_t level, int64_t r, int64_t c) {
    float* const mine = own + level * sums;
    if (level == 0) return pixel(r, c, mine);
    const int64_t y = 2 * r, x = 2 * c;
    const bool together = level == 1 && padded == VL && y + 1 < height && x + 1 < width && counts(y, x) &&
                          counts(y, x + 1) && counts(y + 1, x) && counts(y + 1, x + 1);
    if (together) four_pixels(y, x, mine);
    for (int64_t child = 0; !together && child < 4; child++) {
      const int64_t row = 2 * r + child / 2, column = 2 * c + child % 2;
      if (row << (level - 1) >= height || column << (level - 1) >= width) continue;
      if (level == 1) {
        pixel(row, column, mine);
        continue;
      }
      clear(mine - sums);
      walk(level - 1, row, column);
      for (int64_t i = 0; i < sums; i += VL) store(mine + i, load(mine + i) + load(mine - sums + i));
    }
    finish(level, r, c, mine);
  }

  // Stores the means of a cell, if it is the next of its row.
  void finish(int64_t level, int64_t r, int64_t c, const float* total) {
    const int64_t at = cursor(level, r);
    if (ahead[at] != c) return;
    const int64_t i = next[at]++;
    look_ahead(level, at);
    float* const out = call.levels[level].means + i * (channels + classes);
    const float count = total[padded + channels], share = count > 0.f ? 1.f / count : 0.f;
    for (int64_t k = 0; k < channels; k++)
      out[k] = count > 0.f ? total[padded + k] * share * call.scale[k] + call.shift[k] : 0.f;
    for (int64_t k = 0; k < classes; k += VL)
      store_part(out + channels + k, load(total + k) * share, smaller(classes - k, (int64_t)VL));
  }

  bool counts(int64_t y, int64_t x) const { return !call.valid || call.valid[y * width + x]; }

  // VL classes of a pixel, from k on; those past the last are zero.
  vec value(int64_t y, int64_t x, int64_t k) const {
    const float* above = call.coarse + call.rows.low[y] * call.width * classes + k;
    const float* below = call.coarse + call.rows.high[y] * call.width * classes + k;
    const int64_t left = call.columns.low[x] * classes, right = call.columns.high[x] * classes;
    const float across = call.columns.weight[x], down = call.rows.weight[y];
    const auto part = [&](const float* at) { return classes - k >= VL ? load(at) : load_part(at, classes - k); };
    const vec a = part(above + left), b = part(above + right), upper = a + across * (b - a);
    const vec d = part(below + left), e = part(below + right), lower = d + across * (e - d);
    return upper + down * (lower - upper);
  }

  // Scores, given their sum, become shares of at least CLIP, as in log_shares; logits, given the largest, exp(z - max).
  // Both are then divided by their sum over all classes.
  vec weight(vec v, vec reference, bool last) const {
    if (!SCORES) {
      v -= reference;
      return exp_of(v < LOWEST ? splat(LOWEST) : v);
    }
    v = reference > 0.f ? v / reference : splat(1.f / classes);
    v = v < CLIP ? splat(CLIP) : v;
    return last && absent < 0.f ? vec{} : v;
  }
  vec reference_of(vec v) const { return SCORES ? sum_of(v) : largest_of(v); }

  // Adds the channels of a pixel that counts, and 1, to sums, and stores them as those of its own cell if it has one.
  void add_channels(int64_t y, int64_t x, float* into, float* cell) const {
    const T* of = (const T*)call.image + y * width + x;
    const int64_t plane = height * width;
    if (RGB) {
      const quad extra{(float)of[0], (float)of[plane], (float)of[2 * plane], 1.f};
      *(quad*)(into + padded) += extra;
      if (cell) *(quad*)(cell + padded) = extra;
      return;
    }
    for (int64_t k = 0; k <= channels; k++) {
      const float extra = k < channels ? (float)of[k * plane] : 1.f;
      into[padded + k] += extra;
      if (cell) cell[padded + k] = extra;
    }
  }

  // Adds a pixel to sums, and stores its own values if it is a site.
  void pixel(int64_t y, int64_t x, float* into) {
    float* const z = own + call.count * sums;
    if (!counts(y, x)) {
      clear(z);
      finish(0, y, x, z);
      return;
    }
    vec reference = SCORES ? vec{} : splat(NO_CLASS), total{};
    for (int64_t k = 0; k < padded; k += VL) {
      const vec v = !SCORES && k + VL == padded ? value(y, x, k) + absent : value(y, x, k);
      store(z + k, v);
      reference = SCORES ? reference + v : larger_of(reference, v);
    }
    reference = reference_of(reference);
    for (int64_t k = 0; k < padded; k += VL) {
      const vec v = weight(load(z + k), reference, k + VL == padded);
      store(z + k, v);
      total += v;
    }
    const float share = 1.f / sum_of(total)[0];
    for (int64_t k = 0; k < padded; k += VL) {
      const vec v = load(z + k) * share;
      store(z + k, v);
      store(into + k, load(into + k) + v);
    }
    add_channels(y, x, into, z);
    finish(0, y, x, z);
  }

  // The same for the four pixels of a cell of level 1, all inside and counting, with all classes in one vector: the
  // processor works on all four while it would wait for one.
  void four_pixels(int64_t y, int64_t x, float* into) {
    vec v[4], total{};
    SR_UNROLL
    for (int i = 0; i < 4; i++) v[i] = SCORES ? value(y + i / 2, x + i % 2, 0) : value(y + i / 2, x + i % 2, 0) + absent;
    SR_UNROLL
    for (int i = 0; i < 4; i++) v[i] = weight(v[i], reference_of(v[i]), true);
    SR_UNROLL
    for (int i = 0; i < 4; i++) {
      v[i] *= 1.f / sum_of(v[i])[0];
      total += v[i];
    }
    store(into, load(into) + total);
    for (int i = 0; i < 4; i++) {
      const int64_t row = y + i / 2, column = x + i % 2;
      float* const z = ahead[cursor(0, row)] == column ? own + call.count * sums : nullptr;
      add_channels(row, column, into, z);
      if (!z) continue;
      store(z, v[i]);
      finish(0, row, column, z);
    }
  }
};

template <class T, bool SCORES, bool RGB> int64_t all_strips(const BlockMeans& call) {
  const int64_t coarsest = call.count - 1, side = (int64_t)1 << coarsest;
  int64_t cells = 0, found = 0, bad = 0;
  for (int64_t level = 0; level <= coarsest; level++) cells += call.levels[level].cells.count;
  parallel(ceil_div(call.rows.size, side), call.threads, [&](int64_t strip, int64_t thread) {
    Walk<T, SCORES, RGB> walk(call, strip, thread);
    __atomic_fetch_add(&found, walk.run(), __ATOMIC_RELAXED);
    if (!walk.good) __atomic_store_n(&bad, (int64_t)1, __ATOMIC_RELAXED);
  });
  return bad || found != cells ? SR_SITES_INVALID : SR_OK;
}

template <bool RGB> int64_t of_all(const BlockMeans& call) {
  if (call.bytes == 1) return call.scores ? all_strips<uint8_t, true, RGB>(call) : all_strips<uint8_t, false, RGB>(call);
  return call.scores ? all_strips<float, true, RGB>(call) : all_strips<float, false, RGB>(call);
}

}  // namespace

SR_SIZE_OF(Level)
SR_SIZE_OF(BlockMeans)

// Scratch memory of sr_block_means per thread: floats, and 64-bit integers for the cursors.
SR_API int64_t sr_block_means_floats(int64_t levels, int64_t classes, int64_t channels) {
  return (levels + 1) * sums_of(classes, channels);
}
SR_API int64_t sr_block_means_cursors(int64_t levels) { return cursors_of(levels); }

// Writes the means of all cells. SR_SITES_INVALID: some are outside of the image or not sorted; others are then written.
SR_API int64_t sr_block_means(const BlockMeans* call) {
  if (!call->rows.within(call->height) || !call->columns.within(call->width)) return SR_TABLE_OUT_OF_RANGE;
  return call->channels == 3 ? of_all<true>(*call) : of_all<false>(*call);
}
