// Paged attention and the KV store for CPUs, in portable C++17 with GCC/Clang vector extensions:
// the compiler lowers Lanes (16 floats) to AVX-512, AVX2, SSE or NEON, whatever the machine has.
//
// The unit of work is (sequence, KV head, tile of query rows, range of KV).  A row is one pair
// (query token, query head of the KV head's group), so decoding, where a tile has few rows, and
// prefill, where it is full, run the same online softmax over tiles of KV.  When there are fewer
// units than threads can share, long KV ranges are split and their partial results merged.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"
#include "penstock.h"

namespace {

constexpr int kRows = 64;      // query rows a tile holds
constexpr int kTokens = 64;    // KV tokens a tile holds
constexpr int kFewRows = 8;    // up to here a transposed key tile costs more than it saves
constexpr int kMinSplit = 256; // KV tokens below which splitting a range does not pay
constexpr float kNever = -std::numeric_limits<float>::infinity();

}  // namespace

namespace {

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

template <typename T>
class Attention {
 public:
  explicit Attention(const PenstockAttention& call)
      : a(call), group(call.heads / call.kv_heads), dim(round_up(call.dim)),
        value_dim(round_up(call.value_dim)) {
    plan();
  }

  void run() {
    const int64_t stride = kRows * (value_dim + 2);
    partials.resize(static_cast<size_t>(partial_count) * stride);
    const int64_t count = static_cast<int64_t>(units.size());
    const int threads = static_cast<int>(std::min<int64_t>(a.threads, count));
    // Here, because an exception must not leave a parallel region.
    std::vector<std::unique_ptr<Scratch>> scratches;
    for (int t = 0; t < std::max(threads, 1); ++t)
      scratches.push_back(std::make_unique<Scratch>(dim, value_dim));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Scratch& scratch = *scratches[thread_number()];
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) attend(units[i], scratch);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < static_cast<int64_t>(merges.size()); ++i) merge(merges[i], scratch);
    }
  }

 private:
  const PenstockAttention& a;
  const int64_t group, dim, value_dim;  // widths rounded up to whole Lanes
  std::vector<Unit> units;
  std::vector<Merge> merges;
  std::vector<float> partials;
  int32_t partial_count = 0;

  int32_t position(int32_t sequence, int32_t row) const {
    const int32_t tokens = a.query_start[sequence + 1] - a.query_start[sequence];
    return a.context[sequence] - tokens + row / static_cast<int32_t>(group);
  }

  void plan() {
    int64_t tiles = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
      const int64_t rows = (a.query_start[s + 1] - a.query_start[s]) * group;
      tiles += (rows + kRows - 1) / kRows * a.kv_heads;
    }
    const int64_t wanted = tiles ? std::max<int64_t>(1, 2 * a.threads / tiles) : 1;
    for (int32_t s = 0; s < a.sequences; ++s)
      for (int32_t h = 0; h < a.kv_heads; ++h) {
        const int32_t all = (a.query_start[s + 1] - a.query_start[s]) * static_cast<int32_t>(group);
        // The last rows of a causal prefill are the most expensive ones: deal them out first.
        for (int32_t row = (all - 1) / kRows * kRows; row >= 0 && all; row -= kRows)
          plan_tile(s, h, row, std::min(kRows, all - row), a.threads > 1 ? wanted : 1);
      }
  }

  void plan_tile(int32_t s, int32_t h, int32_t row, int32_t rows, int64_t wanted) {
    const int32_t end = position(s, row + rows - 1) + 1;
    const int32_t first = position(s, row);
    const int32_t begin =
        a.window > 0 ? static_cast<int32_t>(std::max<int64_t>(0, first + 1 - a.window)) : 0;
    const int64_t parts =
        std::max<int64_t>(1, std::min<int64_t>(wanted, (end - begin) / kMinSplit));
    if (parts == 1) {
      units.push_back({s, h, row, rows, begin, end, -1});
      return;
    }
    merges.push_back({s, h, row, rows, partial_count, static_cast<int32_t>(parts)});
    const int32_t step = static_cast<int32_t>((end - begin + parts - 1) / parts);
    for (int32_t p = 0; p < parts; ++p)
      units.push_back({s, h, row, rows, begin + p * step, std::min(end, begin + (p + 1) * step),
                       partial_count++});
  }

  const T* query_row(int32_t sequence, int32_t kv_head, int32_t row) const {
    const int64_t token = a.query_start[sequence] + row / group;
    const int64_t head = kv_head * group + row % group;
    return static_cast<const T*>(a.query) + token * a.query_token_stride +
           head * a.query_head_stride;
  }

  void attend(const Unit& unit, Scratch& w) const {
    for (int32_t r = 0; r < unit.rows; ++r)
      widen(query_row(unit.sequence, unit.kv_head, unit.row + r), w.query.data + r * dim, a.dim,
            dim, a.scale);
    std::fill_n(w.peak.data, unit.rows, kNever);
    std::fill_n(w.total.data, unit.rows, 0.0f);
    std::fill_n(w.sums.data, unit.rows * value_dim, 0.0f);
    for (int32_t at = unit.kv_begin; at < unit.kv_end; at += kTokens) {
      const int32_t tokens = std::min(kTokens, unit.kv_end - at);
      locate(unit, at, tokens, w);
      score(unit.rows, tokens, w);
      soften(unit, at, tokens, w);
      gather_values(unit.rows, tokens, w);
    }
    if (unit.partial < 0) {
      finish(unit.sequence, unit.kv_head, unit.row, unit.rows, w);
      return;
    }
    float* to = const_cast<float*>(partials.data()) +
                static_cast<int64_t>(unit.partial) * kRows * (value_dim + 2);
    std::memcpy(to, w.peak.data, kRows * sizeof(float));
    std::memcpy(to + kRows, w.total.data, kRows * sizeof(float));
    std::memcpy(to + 2 * kRows, w.sums.data, unit.rows * value_dim * sizeof(float));
  }

  // Where the tile's KV rows are.
  void locate(const Unit& unit, int32_t at, int32_t tokens, Scratch& w) const {
    const int32_t* table = a.block_table + unit.sequence * a.table_stride;
    for (int32_t j = 0; j < tokens;) {
      const int64_t block = (at + j) / a.block_size, offset = (at + j) % a.block_size;
      const int64_t base = (table[block] * a.kv_heads + unit.kv_head) * a.block_size + offset;
      const int32_t run = static_cast<int32_t>(
          std::min<int64_t>(tokens - j, a.block_size - offset));
      for (int32_t i = 0; i < run; ++i, ++j) {
        w.key_rows[j] = static_cast<const T*>(a.key_cache) + (base + i) * a.dim;
        w.value_rows[j] = static_cast<const T*>(a.value_cache) + (base + i) * a.value_dim;
      }
    }
  }

  // scores[r][j] = query[r] . key[j]
  void score(int32_t rows, int32_t tokens, Scratch& w) const {
    if (rows <= kFewRows) {
      for (int32_t j = 0; j < tokens; j += kLanes)
        score_few(rows, j, std::min(kLanes, tokens - j), w);
      return;
    }
    for (int32_t j = 0; j < kTokens; j += kLanes)
      for (int64_t d = 0; d < dim; d += kLanes) {
        Lanes tile[kLanes];
        for (int32_t i = 0; i < kLanes; ++i)
          tile[i] = j + i < tokens ? load(static_cast<const T*>(w.key_rows[j + i]), d, a.dim)
                                   : Lanes{};
        transpose(tile);
        for (int32_t i = 0; i < kLanes; ++i) store(w.keys.data + (d + i) * kTokens + j, tile[i]);
      }
    multiply<false>(w.query.data, dim, w.keys.data, kTokens, rows, dim, w.scores.data, kTokens);
  }

  // Sixteen keys against few rows: dot products, then all sixteen sums across lanes at once.
  void score_few(int32_t rows, int32_t j, int32_t count, Scratch& w) const {
    for (int32_t r = 0; r < rows; ++r) {
      Lanes sums[kLanes];
      for (int32_t i = 0; i < kLanes; ++i) sums[i] = Lanes{};
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Lanes q = load_full(w.query.data + r * dim + d);
        for (int32_t i = 0; i < count; ++i)
          sums[i] += q * load(static_cast<const T*>(w.key_rows[j + i]), d, a.dim);
      }
      transpose(sums);
      Lanes total = sums[0];
      for (int32_t i = 1; i < kLanes; ++i) total += sums[i];
      store(w.scores.data + r * kTokens + j, total);
    }
  }

  // Online softmax: turn the tile's scores into weights, rescale what was summed before.
  void soften(const Unit& unit, int32_t at, int32_t tokens, Scratch& w) const {
    for (int32_t r = 0; r < unit.rows; ++r) {
      float* scores = w.scores.data + r * kTokens;
      if (a.softcap > 0)
        for (int32_t j = 0; j < tokens; ++j)
          scores[j] = a.softcap * std::tanh(scores[j] / a.softcap);
      const int64_t where = position(unit.sequence, unit.row + r);
      const int64_t last = std::min<int64_t>(tokens, where + 1 - at);
      const int64_t first = a.window > 0 ? std::max<int64_t>(0, where + 1 - a.window - at) : 0;
      for (int64_t j = 0; j < std::min<int64_t>(first, tokens); ++j) scores[j] = kNever;
      for (int64_t j = std::max<int64_t>(last, 0); j < kTokens; ++j) scores[j] = kNever;
      Lanes top = splat(kNever);
      for (int32_t j = 0; j < kTokens; j += kLanes) top = larger(top, load_full(scores + j));
      const float peak = std::max(w.peak.data[r], largest(top));
      if (peak == kNever) {  // nothing of this tile is in the row's sight
        std::fill_n(scores, kTokens, 0.0f);
        continue;
      }
      Lanes sum{};
      for (int32_t j = 0; j < kTokens; j += kLanes) {
        const Lanes weight = exponential(load_full(scores + j) - splat(peak));
        store(scores + j, weight);
        sum += weight;
      }
      const float keep = std::exp(w.peak.data[r] - peak);
      w.peak.data[r] = peak;
      w.total.data[r] = w.total.data[r] * keep + across(sum);
      if (keep != 1.0f)
        for (int64_t d = 0; d < value_dim; d += kLanes) {
          float* to = w.sums.data + r * value_dim + d;
          store(to, load_full(to) * splat(keep));
        }
    }
  }

  // sums[r] += weights[r] . values
  void gather_values(int32_t rows, int32_t tokens, Scratch& w) const {
    for (int32_t j = 0; j < tokens; ++j)
      widen(static_cast<const T*>(w.value_rows[j]), w.values.data + j * value_dim, a.value_dim,
            value_dim, 1.0f);
    multiply<true>(w.scores.data, kTokens, w.values.data, value_dim, rows, tokens, w.sums.data,
                   value_dim);
  }

  void finish(int32_t sequence, int32_t kv_head, int32_t row, int32_t rows, Scratch& w) const {
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t token = a.query_start[sequence] + (row + r) / group;
      const int64_t head = kv_head * group + (row + r) % group;
      float total = w.total.data[r], keep = 1.0f;
      if (a.sinks) {
        const float peak = std::max(w.peak.data[r], a.sinks[head]);
        keep = std::exp(w.peak.data[r] - peak);
        total = total * keep + std::exp(a.sinks[head] - peak);
      }
      T* to = static_cast<T*>(a.out) + (token * a.heads + head) * a.value_dim;
      narrow(w.sums.data + r * value_dim, to, a.value_dim, keep / total);
    }
  }

  void merge(const Merge& m, Scratch& w) const {
    const int64_t stride = kRows * (value_dim + 2);
    for (int32_t r = 0; r < m.rows; ++r) {
      const float* first = partials.data() + m.first * stride;
      float peak = kNever, total = 0;
      for (int32_t p = 0; p < m.count; ++p) peak = std::max(peak, first[p * stride + r]);
      float* to = w.sums.data + r * value_dim;
      std::fill_n(to, value_dim, 0.0f);
      for (int32_t p = 0; p < m.count; ++p) {
        const float* part = first + p * stride;
        const float keep = std::exp(part[r] - peak);
        total += keep * part[kRows + r];
        const float* from = part + 2 * kRows + r * value_dim;
        for (int64_t d = 0; d < value_dim; ++d) to[d] += keep * from[d];
      }
      w.peak.data[r] = peak;
      w.total.data[r] = total;
    }
    finish(m.sequence, m.kv_head, m.row, m.rows, w);
  }
};

}  // namespace

extern "C" {

int penstock_attention(const PenstockAttention* call) {
  try {
    if (call->bfloat16)
      Attention<BFloat16>(*call).run();
    else
      Attention<float>(*call).run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

void penstock_store(const char* from, char* cache, const int64_t* slots, int64_t tokens,
                    int64_t kv_heads, int64_t block_size, int64_t width, int64_t token_stride,
                    int64_t head_stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
    for (int64_t h = 0; h < kv_heads; ++h)
      std::memcpy(cache + ((block * kv_heads + h) * block_size + offset) * width,
                  from + t * token_stride + h * head_stride, width);
  }
}

int64_t penstock_attention_size() { return sizeof(PenstockAttention); }

}  // extern "C"
