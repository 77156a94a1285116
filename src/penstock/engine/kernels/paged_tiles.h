// The two products of attention in AMX tiles, for a tile of up to 64 query rows and 64 KV tokens.
//
// Scores are computed as keys times queries, since keys lie as the left operand of a tile product
// wants them: 16 tokens by 32 numbers, row by row.  The queries become the right operand once per
// unit of work.  Values become the right operand as they are read, two tokens side by side, and
// are multiplied by weights rounded to bfloat16, which the vector kernels keep in float32.
#pragma once

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "tiles.h"
#include "work.h"

namespace {

#ifdef PENSTOCK_TILES

static_assert(kTileRows == kLanes, "a tile's results are transposed as Lanes");

// Lays out up to 16 rows of `dim` numbers as right operands; rows that do not exist are 0.
inline void queries_to_tiles(const uint16_t* const* rows, int64_t count, int64_t dim,
                             uint16_t* to) {
  for (int64_t d = 0; d < dim; d += kTileInputs, to += kTileSize) {
    Lanes pairs[kLanes];
    for (int64_t r = 0; r < kTileRows; ++r) {
      pairs[r] = Lanes{};
      if (r < count) std::memcpy(&pairs[r], rows[r] + d, sizeof pairs[r]);
    }
    transpose(pairs);
    std::memcpy(to, pairs, sizeof pairs);
  }
}

// 16 tokens' keys, side by side: where they lie if they do, else in `spare`.
inline const uint16_t* keys_together(const void* const* keys, int64_t count, int64_t dim,
                                     uint16_t* spare) {
  const uint16_t* first = static_cast<const uint16_t*>(keys[0]);
  bool together = count == kTileRows;
  for (int64_t i = 1; together && i < count; ++i) together = keys[i] == first + i * dim;
  if (together) return first;
  for (int64_t i = 0; i < kTileRows; ++i)
    if (i < count)
      std::memcpy(spare + i * dim, keys[i], dim * sizeof *spare);
    else
      std::memset(spare + i * dim, 0, dim * sizeof *spare);
  return spare;
}

// scores[r][j] = scale * query[r] . key[j] for 16 tokens and kGroups times 16 rows.
template <int kGroups>
void score_tile(const uint16_t* queries, const uint16_t* keys, int64_t dim, int64_t rows,
                float scale, float* scores) {
  alignas(64) float results[kGroups][kTileRows][kLanes];
  const int64_t group = kTileRows * dim;
  tiles_see_memory();
  _tile_zero(0);
  if constexpr (kGroups > 1) _tile_zero(1);
  if constexpr (kGroups > 2) _tile_zero(2);
  if constexpr (kGroups > 3) _tile_zero(3);
  for (int64_t d = 0; d < dim; d += kTileInputs) {
    const uint16_t* right = queries + d * kTileRows;
    _tile_loadd(4, keys + d, dim * sizeof *keys);
    _tile_loadd(5, right, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kGroups > 1) {
      _tile_loadd(6, right + group, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kGroups > 2) {
      _tile_loadd(5, right + 2 * group, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (kGroups > 3) {
      _tile_loadd(6, right + 3 * group, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, results[0], 64);
  if constexpr (kGroups > 1) _tile_stored(1, results[1], 64);
  if constexpr (kGroups > 2) _tile_stored(2, results[2], 64);
  if constexpr (kGroups > 3) _tile_stored(3, results[3], 64);
  for (int g = 0; g < kGroups; ++g) {
    Lanes lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = load_full(results[g][i]);
    transpose(lanes);
    const int64_t count = std::min<int64_t>(kTileRows, rows - g * kTileRows);
    for (int64_t r = 0; r < count; ++r)
      store(scores + (g * kTileRows + r) * kTokens, lanes[r] * splat(scale));
  }
}

// Asks for the rows from `first` up to `until` that exist, of `dim` numbers each.
inline void ask(const void* const* rows, int64_t first, int64_t until, int64_t count, int64_t dim) {
  for (int64_t j = first; j < std::min(until, count); ++j)
    for (int64_t d = 0; d < dim; d += kTileInputs)
      _mm_prefetch(static_cast<const char*>(rows[j]) + 2 * d, _MM_HINT_T1);
}

inline void scores_in_tiles(const KvRows& kv, const KvRows& coming, int64_t dim, int64_t rows,
                            float scale, TileScratch& w, float* scores) {
  constexpr decltype(&score_tile<1>) kScore[] = {score_tile<1>, score_tile<2>, score_tile<3>,
                                                 score_tile<4>};
  const auto run = kScore[(rows - 1) / kTileRows];
  const int64_t parts = (kv.count + kTileRows - 1) / kTileRows;
  const int64_t each = (coming.count + parts - 1) / parts;
  for (int64_t j = 0, asked = 0; j < kv.count; j += kTileRows, asked += each) {
    const int64_t count = std::min(kTileRows, kv.count - j);
    ask(coming.keys.data(), asked, asked + each, coming.count, dim);
    run(w.queries.data, keys_together(&kv.keys[j], count, dim, w.keys.data), dim, rows, scale,
        scores + j);
  }
}

// Two tokens' numbers side by side; tokens that do not exist are 0.
inline void values_to_tiles(const KvRows& kv, const KvRows& coming, int64_t dim, uint16_t* to) {
  alignas(64) static constexpr uint16_t kOrder[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i low = _mm512_load_si512(kOrder[0]), high = _mm512_load_si512(kOrder[1]);
  const int64_t pairs = (kv.count + kTileInputs - 1) / kTileInputs * kTileRows;
  const int64_t each = (coming.count + pairs - 1) / pairs;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t j = 2 * pair;
    ask(coming.values.data(), pair * each, (pair + 1) * each, coming.count, dim);
    uint16_t* row = to + (pair / kTileRows) * (dim / kTileRows) * kTileSize +
                    pair % kTileRows * kTileInputs;
    for (int64_t d = 0; d < dim; d += kTileInputs, row += 2 * kTileSize) {
      const __m512i none = _mm512_setzero_si512();
      const auto at = [&](int64_t token) {
        return token < kv.count
                   ? _mm512_loadu_si512(static_cast<const uint16_t*>(kv.values[token]) + d)
                   : none;
      };
      const __m512i first = at(j), second = at(j + 1);
      _mm512_store_si512(row, _mm512_permutex2var_epi16(first, low, second));
      _mm512_store_si512(row + kTileSize, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}

// sums[16 rows][16 * kWide numbers] += weights . values
template <int kWide>
void value_tile(const uint16_t* weights, const uint16_t* values, int64_t tokens, int64_t dim,
                float* sums) {
  const int64_t stride = dim * sizeof *sums;
  tiles_see_memory();
  _tile_loadd(0, sums, stride);
  _tile_loadd(1, sums + 16, stride);
  if constexpr (kWide > 2) {
    _tile_loadd(2, sums + 32, stride);
    _tile_loadd(3, sums + 48, stride);
  }
  for (int64_t j = 0; j < tokens; j += kTileInputs, values += dim / kTileRows * kTileSize) {
    _tile_loadd(4, weights + j, kTokens * sizeof *weights);
    _tile_loadd(5, values, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, values + kTileSize, 64);
    _tile_dpbf16ps(1, 4, 6);
    if constexpr (kWide > 2) {
      _tile_loadd(5, values + 2 * kTileSize, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, values + 3 * kTileSize, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  if constexpr (kWide > 2) {
    _tile_stored(2, sums + 32, stride);
    _tile_stored(3, sums + 48, stride);
  }
}

// sums[r] += weights[r] . values
inline void values_in_tiles(const float* weights, const KvRows& kv, const KvRows& coming,
                            int64_t dim, int64_t rows, TileScratch& w, float* sums) {
  values_to_tiles(kv, coming, dim, w.values.data);
  for (int64_t i = 0; i < rows * kTokens; i += 32)
    _mm512_store_si512(w.weights.data + i,
                       (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(weights + i + 16),
                                                    _mm512_load_ps(weights + i)));
  for (int64_t r = 0; r < rows; r += kTileRows)
    for (int64_t d = 0; d < dim; d += 64) {
      const auto run = d + 64 <= dim ? value_tile<4> : value_tile<2>;
      run(w.weights.data + r * kTokens, w.values.data + d / kTileRows * kTileSize,
          kv.count, dim, sums + r * dim + d);
    }
}

#else

inline void queries_to_tiles(const uint16_t* const*, int64_t, int64_t, uint16_t*) {}
inline void scores_in_tiles(const KvRows&, const KvRows&, int64_t, int64_t, float, TileScratch&,
                            float*) {}
inline void values_in_tiles(const float*, const KvRows&, const KvRows&, int64_t, int64_t,
                            TileScratch&, float*) {}

#endif

}  // namespace
