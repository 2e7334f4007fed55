// Geometry: the neighbour tables of all levels. A level is stored as one bit per cell and, for each word of 64 cells,
// the number of sites before that word. The row of a site is that number plus the set bits before its own. This
// replaces a padded index image in a twentieth of the memory: at 8 megapixels it fits the cache, at 100 it is 19 MB
// instead of 400.
#include "simd.h"

struct Grid {
  uint64_t* bits;
  int32_t* rank;
  int64_t batch, height, width;
};
SR_SIZE_OF(Grid)

extern "C" int omp_get_thread_num(void);

// Border of cells that mean "no site": one row above, five rows below, one word on either side.
static const int64_t ABOVE = 1, BELOW = 5;
SR_INLINE int64_t row_words(const Grid& g) { return ceil_div(g.width, 64) + 2; }
SR_INLINE int64_t image_rows(const Grid& g) { return g.height + ABOVE + BELOW; }
// Index of the word of column 0.
SR_INLINE int64_t row_start(const Grid& g, int64_t b, int64_t r) {
  return (b * image_rows(g) + r + ABOVE) * row_words(g) + 1;
}
// One word more than the rows hold, because a window may begin in the last word.
static int64_t words(const Grid& g) { return g.batch * image_rows(g) * row_words(g) + 1; }
SR_INLINE int32_t ones(uint64_t word) { return __builtin_popcountll(word); }

// Consecutive cells of one row: bit i is set if cell column + i is a site; `before` sites come before the first cell.
struct Window {
  uint64_t bits;
  int32_t before;
};
SR_INLINE Window window(const Grid& g, int64_t start, int64_t column) {
  const int64_t word = start + (column >> 6), shift = column & 63;
  const uint64_t low = g.bits[word];
  const uint64_t bits = low >> shift | (shift ? g.bits[word + 1] << (64 - shift) : 0);
  return {bits, g.rank[word] + ones(low & (((uint64_t)1 << shift) - 1))};
}
// The rows of the first COUNT cells of the window; `missing` where there is no site.
template <int COUNT> SR_INLINE void cells(Window w, int32_t missing, int32_t* out) {
  int32_t row = w.before;
  SR_UNROLL for (int i = 0; i < COUNT; i++) {
    const int32_t bit = w.bits >> i & 1;
    out[i] = bit ? row : missing;
    row += bit;
  }
}

// Calls f(row of the site, column) for all sites of image row (b, r), in order.
template <class F> SR_INLINE void each_site(const Grid& g, int64_t b, int64_t r, F f) {
  const int64_t start = row_start(g, b, r), n = ceil_div(g.width, 64);
  int64_t site = g.rank[start];
  for (int64_t i = 0; i < n; i++)
    for (uint64_t word = g.bits[start + i]; word; word &= word - 1) f(site++, i * 64 + __builtin_ctzll(word));
}
template <class F> static void each_row(const Grid& g, int64_t threads, F f) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) collapse(2)
  for (int64_t b = 0; b < g.batch; b++)
    for (int64_t r = 0; r < g.height; r++) f(b, r);
}

static int64_t number(const Grid& g) {
  const int64_t n = words(g);
  int64_t total = 0;
  for (int64_t i = 0; i < n; i++) {
    g.rank[i] = (int32_t)total;
    total += ones(g.bits[i]);
  }
  return total;
}

SR_API int64_t sr_grid_words(int64_t batch, int64_t height, int64_t width) {
  return words(Grid{nullptr, nullptr, batch, height, width});
}

// Sites [n, 3] -> grid. The grid's bits must be zero. Refuses sites that are out of range, repeated or not sorted.
SR_API int64_t sr_grid_from_sites(const Grid* grid, const int32_t* coords, int64_t n) {
  const Grid& g = *grid;
  int64_t last = -1;
  for (int64_t i = 0; i < n; i++) {
    const int64_t b = coords[3 * i], r = coords[3 * i + 1], c = coords[3 * i + 2];
    if (b < 0 || b >= g.batch || r < 0 || r >= g.height || c < 0 || c >= g.width) return SR_SITES_INVALID;
    const int64_t position = (b * g.height + r) * g.width + c;
    if (position <= last) return SR_SITES_INVALID;
    last = position;
    g.bits[row_start(g, b, r) + (c >> 6)] |= (uint64_t)1 << (c & 63);
  }
  number(g);
  return SR_OK;
}

// Compacts every second bit, from bit 0 on, into the lower half.
SR_INLINE uint64_t even_bits(uint64_t x) {
  x &= 0x5555555555555555u;
  x = (x | x >> 1) & 0x3333333333333333u;
  x = (x | x >> 2) & 0x0f0f0f0f0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
  x = (x | x >> 8) & 0x0000ffff0000ffffu;
  return (x | x >> 16) & 0x00000000ffffffffu;
}

// Finds the cells with a site in their `size` x `size` window (3: `paper`, 2: `cell`), stride 2. Returns their number.
SR_API int64_t sr_grid_coarser(const Grid* fine_grid, const Grid* coarse_grid, int64_t size, int64_t threads) {
  const Grid &f = *fine_grid, &c = *coarse_grid;
  const int64_t coarse_words = ceil_div(c.width, 64), fine_words = ceil_div(f.width, 64);
  each_row(c, threads, [&](int64_t b, int64_t r) {
    const uint64_t* rows[3];
    for (int64_t i = 0; i < size; i++) rows[i] = f.bits + row_start(f, b, 2 * r + i);
    auto any_row = [&](int64_t word) -> uint64_t {
      if (word >= fine_words) return 0;
      return rows[0][word] | rows[1][word] | (size == 3 ? rows[2][word] : 0);
    };
    auto any_cell = [&](int64_t word) -> uint64_t {
      const uint64_t here = any_row(word), next = any_row(word + 1);
      uint64_t any = here | here >> 1 | next << 63;
      if (size == 3) any |= here >> 2 | next << 62;
      return even_bits(any);
    };
    for (int64_t i = 0; i < coarse_words; i++) {
      const int64_t columns = c.width - i * 64;
      const uint64_t inside = columns >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << columns) - 1;
      c.bits[row_start(c, b, r) + i] = (any_cell(2 * i) | any_cell(2 * i + 1) << 32) & inside;
    }
  });
  return number(c);
}

// Grid -> sites [n, 3].
SR_API int64_t sr_grid_sites(const Grid* grid, int32_t* coords, int64_t threads) {
  const Grid& g = *grid;
  each_row(g, threads, [&](int64_t b, int64_t r) {
    each_site(g, b, r, [&](int64_t site, int64_t c) {
      coords[3 * site] = (int32_t)b, coords[3 * site + 1] = (int32_t)r, coords[3 * site + 2] = (int32_t)c;
    });
  });
  return SR_OK;
}

// Submanifold 3x3 table [n, 9].
SR_API int64_t sr_grid_around(const Grid* grid, int64_t n, int32_t* table, int64_t threads) {
  const Grid& g = *grid;
  each_row(g, threads, [&](int64_t b, int64_t r) {
    const int64_t start = row_start(g, b, r), stride = row_words(g);
    each_site(g, b, r, [&](int64_t site, int64_t c) {
      SR_UNROLL for (int i = 0; i < 3; i++)
        cells<3>(window(g, start + (i - 1) * stride, c - 1), (int32_t)n, table + site * 9 + i * 3);
    });
  });
  return SR_OK;
}

// Table of the convolution to the coarser level [n_coarse, size^2]: cell (2 r + i, 2 c + j) of the finer one.
SR_API int64_t sr_grid_children(const Grid* fine_grid, const Grid* coarse_grid, int64_t size, int64_t n, int32_t* table,
                                int64_t threads) {
  const Grid &f = *fine_grid, &g = *coarse_grid;
  each_row(g, threads, [&](int64_t b, int64_t r) {
    each_site(g, b, r, [&](int64_t site, int64_t c) {
      for (int64_t i = 0; i < size; i++) {
        const Window w = window(f, row_start(f, b, 2 * r + i), 2 * c);
        int32_t* row = table + (site * size + i) * size;
        size == 3 ? cells<3>(w, (int32_t)n, row) : cells<2>(w, (int32_t)n, row);
      }
    });
  });
  return SR_OK;
}

// The coarser cells o with 2 o + tap = site, for the taps of the site's parity, in the order of the taps.
template <class F> SR_INLINE void each_parent(const Grid& coarse, int64_t size, int64_t b, int64_t r, int64_t c,
                                              int32_t missing, F f) {
  for (int64_t i = r & 1; i < size; i += 2)
    for (int64_t j = c & 1; j < size; j += 2) {
      int32_t parent;
      cells<1>(window(coarse, row_start(coarse, b, (r - i) >> 1), (c - j) >> 1), missing, &parent);
      f(i * size + j, parent);
    }
}

// Transposed table [n_fine, size^2]. The caller fills it with `n_coarse` first.
SR_API int64_t sr_grid_parents(const Grid* fine_grid, const Grid* coarse_grid, int64_t size, int64_t n_coarse,
                               int32_t* table, int64_t threads) {
  const Grid &f = *fine_grid, &g = *coarse_grid;
  each_row(f, threads, [&](int64_t b, int64_t r) {
    each_site(f, b, r, [&](int64_t site, int64_t c) {
      each_parent(g, size, b, r, c, (int32_t)n_coarse,
                  [&](int64_t tap, int32_t parent) { table[site * size * size + tap] = parent; });
    });
  });
  return SR_OK;
}

// The transposed convolution by parity of row and column: sites of one parity read the same 4, 2, 2 or 1 taps (2 x 2:
// one). offsets [batch * height, 2]: scratch. counts [4]: number of sites of each parity. rows [n]: the sites, grouped
// by parity. table: their parents, [counts[0], taps of parity 0], [counts[1], ...] one after the other.
SR_API int64_t sr_grid_parities(const Grid* fine_grid, const Grid* coarse_grid, int64_t size, int64_t n_coarse,
                                int64_t* offsets, int64_t* counts, int32_t* rows, int32_t* table, int64_t threads) {
  const Grid &f = *fine_grid, &g = *coarse_grid;
  const int64_t n = ceil_div(f.width, 64);
  const uint64_t even = 0x5555555555555555u;
  memset(counts, 0, 4 * sizeof(int64_t));
  for (int64_t b = 0; b < f.batch; b++)
    for (int64_t r = 0; r < f.height; r++) {
      int64_t* offset = offsets + (b * f.height + r) * 2;
      int64_t* count = counts + (r & 1) * 2;
      offset[0] = count[0], offset[1] = count[1];
      for (int64_t i = 0; i < n; i++) {
        const uint64_t word = f.bits[row_start(f, b, r) + i];
        count[0] += ones(word & even), count[1] += ones(word & ~even);
      }
    }
  int64_t first[4], taps[4], row_total = 0, table_total = 0, first_row[4];
  for (int64_t parity = 0; parity < 4; parity++) {
    taps[parity] = ceil_div(size - parity / 2, 2) * ceil_div(size - parity % 2, 2);
    first_row[parity] = row_total, first[parity] = table_total;
    row_total += counts[parity], table_total += counts[parity] * taps[parity];
  }
  each_row(f, threads, [&](int64_t b, int64_t r) {
    const int64_t* offset = offsets + (b * f.height + r) * 2;
    int64_t next[2] = {offset[0], offset[1]};
    each_site(f, b, r, [&](int64_t site, int64_t c) {
      const int64_t parity = (r & 1) * 2 + (c & 1), i = next[c & 1]++;
      rows[first_row[parity] + i] = (int32_t)site;
      int32_t* parents = table + first[parity] + i * taps[parity];
      each_parent(g, size, b, r, c, (int32_t)n_coarse, [&](int64_t, int32_t parent) { *parents++ = parent; });
    });
  });
  return SR_OK;
}

// Tiles of 4 x 4 cells for Winograd's convolution, each with the ring around it: [tiles, 6, 6] rows. The image is
// divided into bands of four rows. In a band, each tile begins at the first site not yet covered, which takes 5 to 10 %
// fewer tiles than a fixed grid. quarters: 4 tile + quarter for each 2 x 2 with a site. counts [batch * bands, 2]:
// tiles and quarters before each band. The first call, with tiles = null, writes counts and totals [2]; the second
// fills the rest.
SR_API int64_t sr_grid_tiles(const Grid* grid, int64_t n, int64_t* counts, int64_t* totals, int32_t* tiles,
                             int32_t* quarters, int64_t threads) {
  const Grid& g = *grid;
  const int64_t bands = ceil_div(g.height, 4), stride = row_words(g), n_words = ceil_div(g.width, 64);
  auto each_tile = [&](int64_t b, int64_t band, auto f) {
    const int64_t start = row_start(g, b, band * 4);
    int64_t free = 0;  // first column that no tile covers
    for (int64_t i = 0; i < n_words; i++) {
      const uint64_t* word = g.bits + start + i;
      uint64_t any = word[0] | word[stride] | word[2 * stride] | word[3 * stride];
      if (free > i * 64) any &= ~(uint64_t)0 << (free - i * 64);
      while (any) {
        const int64_t bit = __builtin_ctzll(any), c = i * 64 + bit;
        f(start, c);
        free = c + 4;
        any = bit + 4 < 64 ? any & (~(uint64_t)0 << (bit + 4)) : 0;
      }
    }
  };
  auto four_quarters = [&](int64_t start, int64_t c) {  // bit q: quarter q has a site
    uint64_t half[2] = {};
    for (int64_t i = 0; i < 4; i++) half[i / 2] |= window(g, start + i * stride, c).bits;
    return (half[0] & 3 ? 1 : 0) | (half[0] & 12 ? 2 : 0) | (half[1] & 3 ? 4 : 0) | (half[1] & 12 ? 8 : 0);
  };
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) collapse(2)
  for (int64_t b = 0; b < g.batch; b++)
    for (int64_t band = 0; band < bands; band++) {
      int64_t* count = counts + (b * bands + band) * 2;
      if (!tiles) count[0] = count[1] = 0;
      int64_t tile = count[0], quarter = count[1];
      each_tile(b, band, [&](int64_t start, int64_t c) {
        if (tiles)
          SR_UNROLL for (int r = 0; r < 6; r++)
            cells<6>(window(g, start + (r - 1) * stride, c - 1), (int32_t)n, tiles + tile * 36 + r * 6);
        const int present = four_quarters(start, c);
        for (int q = 0; q < 4; q++)
          if (present >> q & 1) {
            if (quarters) quarters[quarter] = (int32_t)(tile * 4 + q);
            quarter++;
          }
        tile++;
      });
      if (!tiles) count[0] = tile, count[1] = quarter;
    }
  if (tiles) return SR_OK;
  totals[0] = totals[1] = 0;
  for (int64_t i = 0; i < g.batch * bands; i++)
    for (int64_t k = 0; k < 2; k++) {
      const int64_t here = counts[2 * i + k];
      counts[2 * i + k] = totals[k];
      totals[k] += here;
    }
  return SR_OK;
}
