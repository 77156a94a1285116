// How attention is dealt out: units of work, their partial results, and memory to work in.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"
#include "tiles.h"

namespace {

constexpr int kRows = 64;      // query rows a tile holds
constexpr int kTokens = 64;    // KV tokens a tile holds
constexpr int kFewRows = 8;    // up to here a transposed key tile costs more than it saves
constexpr int kTileLeast = 2;  // rows below which a tile product is too empty to pay
constexpr int kMinSplit = 256; // KV tokens below which splitting a range does not pay
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Unit {
  int32_t sequence, kv_head;
  int32_t row, rows;         // rows [row, row + rows) of the sequence's tokens x group
  int32_t kv_begin, kv_end;  // the KV tokens it reads
  int32_t partial;           // index of its partial result; -1: it writes the output itself
};

struct Merge {
  int32_t sequence, kv_head, row, rows, first, count;
};

// Where the KV of a tile's tokens is.
struct KvRows {
  std::vector<const void*> keys, values;
  int64_t count = 0;
  KvRows() : keys(kTokens), values(kTokens) {}
};

// Per-thread working memory for AMX.
struct TileScratch {
  Halves queries;  // right operands: [16 rows each][32 numbers each]
  Halves values;   // right operands: [32 tokens each][16 numbers each]
  Halves weights;  // [kRows][kTokens]
  Halves keys;     // [16 tokens][dim], where they do not lie side by side in the cache
  TileScratch(int64_t dim, int64_t value_dim)
      : queries(kRows * dim), values(kTokens * value_dim), weights(kRows * kTokens),
        keys(kTileRows * dim) {}
};

// Per-thread working memory.
struct Scratch {
  AlignedFloats query, keys, values, scores, sums, peak, total;
  KvRows rows, coming;  // of the tile in hand, and of the next one
  std::unique_ptr<TileScratch> tiles;
  Scratch(int64_t dim, int64_t value_dim, bool with_tiles)
      : query(kRows * dim), keys(kTokens * dim), values(kTokens * value_dim),
        scores(kRows * kTokens), sums(kRows * value_dim), peak(kRows), total(kRows),
        tiles(with_tiles ? std::make_unique<TileScratch>(dim, value_dim) : nullptr) {}
};

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace
