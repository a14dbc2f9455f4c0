// Products of float32 matrices in tiles that stay in registers (Goto & van de Geijn 2008, Anatomy of high-performance
// matrix multiplication). The second factor is packed once, in panels of as many columns as a tile has, the first one
// block by block. Every element is a sum of sums over kChain of k in ascending order, in parts of kDepth: the same for
// any thread.
#pragma once

#include "matrix.h"

namespace seda::SEDA_ISA {

// A tile's sums, a line of the second factor and one value of the first fill the registers of x86-64: 32 or 16.
constexpr int64_t kTileRows = kLanes == 16 ? 12 : 6, kTileVectors = 2, kTileColumns = kTileVectors * kLanes;
// A panel of the first factor, kTileRows x kDepth, stays in the first cache, a block of them in the second, beside a
// group of the second factor's panels.
constexpr int64_t kDepth = 512, kBlockPanels = 10, kGroupPanels = 8;
// So many products are added one after another, then chains to one another: the roundings of a sum of n grow with the
// root of the longest chain. Of 512 or 1024 products in one of 512, the error was 1.7 times that of MKL's sums and the
// largest 2.4 times; in chains of 128 it is 0.85 times MKL's, in the same time.
constexpr int64_t kChain = 128;

SEDA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(SEDA_MM)
// to[i * width + j] = from[j * stride + i] for i, j in 0 .. 3.
SEDA_INLINE void turn_four(const float* from, int64_t stride, float* to, int64_t width) {
  __m128 line[4];
  for (int j = 0; j < 4; ++j) line[j] = _mm_loadu_ps(from + j * stride);
  _MM_TRANSPOSE4_PS(line[0], line[1], line[2], line[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * width, line[i]);
}
#else
SEDA_INLINE void turn_four(const float* from, int64_t stride, float* to, int64_t width) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[i * width + j] = from[j * stride + i];
}
#endif

// Elements k0 .. k1 - 1 of up to `width` lines from `first` on, side by side: to[(k - k0) * width + line]. Lines that
// the factor lacks are 0.
SEDA_INLINE void pack_panel(const Factor& from, int64_t lines, int64_t first, int64_t width, int64_t k0, int64_t k1,
                            float* to) {
  const int64_t count = smaller(width, lines - first);
  for (int64_t line = count; line < width; ++line)
    for (int64_t k = k0; k < k1; ++k) to[(k - k0) * width + line] = 0.0f;
  if (from.line == 1) {
    const float* p = from.data + first + k0 * from.element;
    // A whole panel's width is a constant, which spares a call for each k.
    for (int64_t k = k0; k < k1; ++k, p += from.element, to += width)
      memcpy(to, p, static_cast<size_t>(count == width ? width : count) * sizeof(float));
    return;
  }
  constexpr int64_t kTogether = 64;  // elements whose places stay in the first cache while all lines are read
  for (int64_t k = k0; k < k1; k += kTogether) {
    const int64_t last = smaller(k + kTogether, k1);
    for (int64_t line = 0; line < count; line += 4) {
      const float* p = from.data + (first + line) * from.line;
      float* q = to + (k - k0) * width + line;
      int64_t i = k;
      if (line + 4 <= count)
        for (; i + 4 <= last; i += 4) turn_four(p + i, from.line, q + (i - k) * width, width);
      for (; i < last; ++i)
        for (int64_t j = 0; j < smaller(4, count - line); ++j) q[(i - k) * width + j] = p[j * from.line + i];
    }
  }
}

// Panels begin .. end - 1 of the second factor, whose lines are its columns.
static void pack(const Factor& from, int64_t lines, int64_t depth, float* to, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    pack_panel(from, lines, panel * kTileColumns, kTileColumns, 0, depth, to + panel * depth * kTileColumns);
}

// Where a tile's sums go: rows x columns of out, added to what is there, to the bias, or to neither.
struct Place {
  float* out;
  int64_t stride, rows, columns;
  const float* bias;
  bool adds;

  inline __attribute__((always_inline)) F with_others(F sum, int64_t i, int64_t j) const {
    if (adds) sum += load(out + i * stride + j);
    return bias == nullptr ? sum : sum + load(bias + j);
  }
};

// The sums over `depth` elements of k of one panel of each factor.
SEDA_INLINE void tile_sums(int64_t depth, const float* a, const float* b, F (&total)[kTileRows][kTileVectors]) {
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileColumns) {
    F right[kTileVectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < kTileVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kTileRows; ++i) {
      const F left = broadcast(a[i]);
#pragma GCC unroll 2
      for (int64_t v = 0; v < kTileVectors; ++v) total[i][v] += left * right[v];
    }
  }
}

// One panel of each factor. A tile at an edge is made whole beside its place first.
SEDA_INLINE void tile(int64_t depth, const float* a, const float* b, const Place& place) {
  float before[kTileRows * kTileColumns];  // the chains but the last, summed
  const int64_t last = depth > kChain ? (depth - 1) / kChain * kChain : 0;
  for (int64_t k = 0; k < last; k += kChain) {
    F chain[kTileRows][kTileVectors] = {};
    tile_sums(kChain, a + k * kTileRows, b + k * kTileColumns, chain);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < kTileVectors; ++v) {
        float* const sum = before + i * kTileColumns + v * kLanes;
        store(sum, k == 0 ? chain[i][v] : load(sum) + chain[i][v]);
      }
  }
  F total[kTileRows][kTileVectors] = {};
  tile_sums(depth - last, a + last * kTileRows, b + last * kTileColumns, total);
  if (last > 0)
#pragma GCC unroll 12
    for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < kTileVectors; ++v) total[i][v] += load(before + i * kTileColumns + v * kLanes);
  const bool whole = place.rows == kTileRows && place.columns == kTileColumns;
  float edge[kTileRows * kTileColumns];
#pragma GCC unroll 12
  for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int64_t v = 0; v < kTileVectors; ++v) {
      if (whole)
        store(place.out + i * place.stride + v * kLanes, place.with_others(total[i][v], i, v * kLanes));
      else
        store(edge + i * kTileColumns + v * kLanes, total[i][v]);
    }
  if (whole) return;
  for (int64_t i = 0; i < place.rows; ++i)
    over_row(place.columns, [&](int64_t j, auto part) {
      F sum = load(edge + i * kTileColumns + j, part);
      float* const out = place.out + i * place.stride + j;
      if (place.adds) sum += load(out, part);
      store(out, place.bias == nullptr ? sum : sum + load(place.bias + j, part), part);
    });
}

// Panels of rows begin .. end - 1 and panels of columns first .. last - 1 of the product.
static void product_tiles(const TilesArguments& t, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (int64_t block = begin; block < end; block += kBlockPanels)
    for (int64_t k0 = 0; k0 < t.depth; k0 += kDepth) {
      const int64_t k1 = smaller(k0 + kDepth, t.depth), depth = k1 - k0, after = smaller(block + kBlockPanels, end);
      for (int64_t i = block; i < after; ++i)
        pack_panel(t.a, t.rows, i * kTileRows, kTileRows, k0, k1, t.block + (i - block) * kTileRows * depth);
      for (int64_t group = first; group < last; group += kGroupPanels)
        for (int64_t i = block; i < after; ++i)
          for (int64_t j = group; j < smaller(group + kGroupPanels, last); ++j)
            tile(depth, t.block + (i - block) * kTileRows * depth, t.b + (j * t.depth + k0) * kTileColumns,
                 {t.out + i * kTileRows * t.stride + j * kTileColumns, t.stride,
                  smaller(kTileRows, t.rows - i * kTileRows), smaller(kTileColumns, t.columns - j * kTileColumns),
                  k0 > 0 || t.bias == nullptr ? nullptr : t.bias + j * kTileColumns, t.adds || k0 > 0});
    }
}

}  // namespace seda::SEDA_ISA
