// How attention is dealt out: units of work, their partial results, and memory to work in.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"

namespace {

constexpr int kRows = 64;      // query rows a tile holds
constexpr int kTokens = 64;    // KV tokens a tile holds
constexpr int kFewRows = 8;    // up to here a transposed key tile costs more than it saves
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

// Per-thread working memory.
struct Scratch {
  AlignedFloats query, keys, values, scores, sums, peak, total;
  std::vector<const void*> key_rows, value_rows;
  Scratch(int64_t dim, int64_t value_dim)
      : query(kRows * dim), keys(kTokens * dim), values(kTokens * value_dim),
        scores(kRows * kTokens), sums(kRows * value_dim), peak(kRows), total(kRows),
        key_rows(kTokens), value_rows(kTokens) {}
};

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace
