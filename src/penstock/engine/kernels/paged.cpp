// Paged attention and the KV store for CPUs, in portable C++17 with GCC/Clang vector extensions:
// the compiler lowers Lanes (16 floats) to AVX-512, AVX2, SSE or NEON, whatever the machine has.
// Dot products in bfloat16 (below) and products in AMX tiles (paged_tiles.h) are what is not.
//
// The unit of work is (sequence, KV head, tile of query rows, range of KV).  A row is one pair
// (query token, query head of the KV head's group), so decoding, where a tile has few rows, and
// prefill, where it is full, run the same online softmax over tiles of KV.  When there are fewer
// units than threads can share, long KV ranges are split and their partial results merged.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "lanes.h"
#include "paged_tiles.h"
#include "penstock.h"
#include "work.h"

namespace {

template <typename T>
class Attention {
 public:
  explicit Attention(const PenstockAttention& call)
      : a(call), group(call.heads / call.kv_heads), dim(round_up(call.dim)),
        value_dim(round_up(call.value_dim)), tiles(for_tiles(call)) {
    plan();
  }

  void run() {
    const int64_t stride = kRows * (value_dim + 2);
    partials.resize(static_cast<size_t>(partial_count) * stride);
    const int64_t count = static_cast<int64_t>(units.size());
    // All threads or one: libgomp ends its other threads when a region asks for fewer.
    const int threads = count > 1 ? a.threads : 1;
    const int helpers = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(count, 1)));
    // Decoding has many small units, prefill few large ones.
    const int64_t chunk = std::clamp<int64_t>(count / (16 * helpers), 1, 4);
    // Made here, because an exception must not leave a parallel region.
    std::vector<std::unique_ptr<Scratch>> scratches;
    for (int t = 0; t < helpers; ++t)
      scratches.push_back(std::make_unique<Scratch>(dim, value_dim, tiles));
    std::atomic<int64_t> next_unit{0}, next_merge{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int me = thread_number();
      if (tiles) configure_tiles();
      for (int64_t i; me < helpers && (i = next_unit.fetch_add(chunk)) < count;)
        for (int64_t end = std::min(count, i + chunk); i < end; ++i)
          attend(units[i], i + 1 < count ? &units[i + 1] : nullptr, *scratches[me]);
#pragma omp barrier
      const int64_t rest = static_cast<int64_t>(merges.size());
      for (int64_t i; me < helpers && (i = next_merge.fetch_add(1)) < rest;)
        merge(merges[i], *scratches[me]);
      if (tiles) release_tiles();
    }
  }

 private:
  const PenstockAttention& a;
  const int64_t group, dim, value_dim;  // widths rounded up to whole Lanes
  const bool tiles;                     // whether AMX multiplies
  std::vector<Unit> units;
  std::vector<Merge> merges;
  std::vector<float> partials;
  int32_t partial_count = 0;

  int32_t position(int32_t sequence, int32_t row) const {
    const int32_t tokens = a.query_start[sequence + 1] - a.query_start[sequence];
    return a.context[sequence] - tokens + row / static_cast<int32_t>(group);
  }

  void plan() {
    int64_t parts = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
      const int64_t rows = (a.query_start[s + 1] - a.query_start[s]) * group;
      parts += (rows + kRows - 1) / kRows * a.kv_heads;
    }
    const int64_t wanted = parts ? std::max<int64_t>(1, 2 * a.threads / parts) : 1;
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

  static bool for_tiles(const PenstockAttention& call) {
    return call.bfloat16 && call.dim % kTileInputs == 0 && call.value_dim % kTileInputs == 0 &&
           tiles_allowed();
  }

  bool in_tiles(int32_t rows) const { return tiles && rows >= kTileLeast; }

  // `next` is what this thread probably does next.
  void attend(const Unit& unit, const Unit* next, Scratch& w) const {
    if (in_tiles(unit.rows)) lay_out_queries(unit, *w.tiles);
    // With tiles one row takes dot products in bfloat16, more become operands of tiles.
    for (int32_t r = 0; r < unit.rows && !tiles; ++r)
      widen(query_row(unit.sequence, unit.kv_head, unit.row + r), w.query.data + r * dim, a.dim,
            dim, a.scale);
    std::fill_n(w.peak.data, unit.rows, kNever);
    std::fill_n(w.total.data, unit.rows, 0.0f);
    std::fill_n(w.sums.data, unit.rows * value_dim, 0.0f);
    locate(unit, unit.kv_begin, unit.kv_end, w.coming);
    for (int32_t at = unit.kv_begin; at < unit.kv_end; at += kTokens) {
      std::swap(w.rows, w.coming);
      look_ahead(unit, at + kTokens, next, w.coming);
      const int32_t tokens = static_cast<int32_t>(w.rows.count);
      if (unit.rows <= kFewRows && !in_tiles(unit.rows)) prefetch(tokens, w);
      score(unit, tokens, w);
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

  // Where a tile's KV rows are.
  void locate(const Unit& unit, int32_t at, int32_t end, KvRows& to) const {
    const int32_t tokens = std::min(kTokens, end - at);
    const int32_t* table = a.block_table + unit.sequence * a.table_stride;
    int64_t block = at / a.block_size, offset = at % a.block_size;
    for (int32_t j = 0; j < tokens; ++block, offset = 0) {
      const int64_t row = (table[block] * a.kv_heads + unit.kv_head) * a.block_size + offset;
      const T* key = static_cast<const T*>(a.key_cache) + row * a.dim;
      const T* value = static_cast<const T*>(a.value_cache) + row * a.value_dim;
      for (int64_t i = offset; i < a.block_size && j < tokens; ++i, ++j) {
        to.keys[j] = key;
        to.values[j] = value;
        key += a.dim;
        value += a.value_dim;
      }
    }
    to.count = tokens;
  }

  // Values are needed only after the scores, and blocks lie anywhere: ask for them now.
  void prefetch(int32_t tokens, const Scratch& w) const {
    for (int32_t j = 0; j < tokens; ++j)
      for (int64_t d = 0; d < a.value_dim; d += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(static_cast<const T*>(w.rows.values[j]) + d);
  }

  // What comes after this tile, here or in the thread's next unit.  Where products are quick it is
  // asked for while they are made: memory is all there is to wait for then.
  void look_ahead(const Unit& unit, int32_t at, const Unit* next, KvRows& to) const {
    to.count = 0;
    if (at < unit.kv_end)
      locate(unit, at, unit.kv_end, to);
    else if (in_tiles(unit.rows) && next)
      locate(*next, next->kv_begin, next->kv_end, to);
  }

  void lay_out_queries(const Unit& unit, TileScratch& w) const {
    for (int32_t from = 0; from < unit.rows; from += kTileRows) {
      const uint16_t* rows[kTileRows];
      const int32_t count = std::min<int32_t>(kTileRows, unit.rows - from);
      for (int32_t r = 0; r < count; ++r)
        rows[r] = reinterpret_cast<const uint16_t*>(
            query_row(unit.sequence, unit.kv_head, unit.row + from + r));
      queries_to_tiles(rows, count, a.dim, w.queries.data + from * a.dim);
    }
  }

  // scores[r][j] = query[r] . key[j]
  void score(const Unit& unit, int32_t tokens, Scratch& w) const {
    const int32_t rows = unit.rows;
    if (in_tiles(rows)) {
      scores_in_tiles(w.rows, w.coming, a.dim, rows, a.scale, *w.tiles, w.scores.data);
      return;
    }
    if (rows <= kFewRows) {
      for (int32_t j = 0; j < tokens; j += kLanes)
        score_few(unit, j, std::min(kLanes, tokens - j), w);
      return;
    }
    for (int32_t j = 0; j < kTokens; j += kLanes)
      for (int64_t d = 0; d < dim; d += kLanes) {
        Lanes tile[kLanes];
        for (int32_t i = 0; i < kLanes; ++i)
          tile[i] = j + i < tokens ? load(static_cast<const T*>(w.rows.keys[j + i]), d, a.dim)
                                   : Lanes{};
        transpose(tile);
        for (int32_t i = 0; i < kLanes; ++i) store(w.keys.data + (d + i) * kTokens + j, tile[i]);
      }
    multiply<false>(w.query.data, dim, w.keys.data, kTokens, rows, dim, w.scores.data, kTokens);
  }

  // Sixteen keys against few rows: dot products, then all sixteen sums across lanes at once.
  void score_few(const Unit& unit, int32_t j, int32_t count, Scratch& w) const {
    for (int32_t r = 0; r < unit.rows; ++r) {
      Lanes sums[kLanes];
      dots(unit, r, &w.rows.keys[j], count, w, sums);
      for (int32_t i = count; i < kLanes; ++i) sums[i] = Lanes{};
      store(w.scores.data + r * kTokens + j, row_sums(sums));
    }
  }

  void dots([[maybe_unused]] const Unit& unit, int32_t r, const void** keys, int32_t count, const Scratch& w,
            Lanes* sums) const {
#ifdef __AVX512BF16__
    if (std::is_same<T, BFloat16>::value && a.dim % 32 == 0) {
      const T* query = query_row(unit.sequence, unit.kv_head, unit.row + r);
      for (int32_t i = 0; i < count; ++i) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < a.dim; d += 32)
          sum = _mm512_dpbf16_ps(
              sum, (__m512bh)_mm512_loadu_si512(query + d),
              (__m512bh)_mm512_loadu_si512(static_cast<const T*>(keys[i]) + d));
        sums[i] = (Lanes)sum * splat(a.scale);
      }
      return;
    }
#endif
    const float* query = w.query.data + r * dim;
    for (int32_t i = 0; i < count; ++i) {
      sums[i] = Lanes{};
      for (int64_t d = 0; d < dim; d += kLanes)
        sums[i] += load_full(query + d) * load(static_cast<const T*>(keys[i]), d, a.dim);
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
    if (in_tiles(rows)) {
      values_in_tiles(w.scores.data, w.rows, w.coming, a.value_dim, rows, *w.tiles,
                      w.sums.data);
      return;
    }
    if (rows <= kFewRows) {
      int32_t r = 0;
      for (; r + 4 <= rows; r += 4) gather_few<4>(r, tokens, w);
      for (; r + 2 <= rows; r += 2) gather_few<2>(r, tokens, w);
      for (; r < rows; ++r) gather_few<1>(r, tokens, w);
      return;
    }
    for (int32_t j = 0; j < tokens; ++j)
      widen(static_cast<const T*>(w.rows.values[j]), w.values.data + j * value_dim, a.value_dim,
            value_dim, 1.0f);
    multiply<true>(w.scores.data, kTokens, w.values.data, value_dim, rows, tokens, w.sums.data,
                   value_dim);
  }

  template <int R>
  void gather_few(int32_t r, int32_t tokens, Scratch& w) const {
    int64_t d = 0;
    for (; d + 4 * kLanes <= a.value_dim; d += 4 * kLanes) gather_columns<R, 4>(r, d, tokens, w);
    for (; d < a.value_dim; d += kLanes) gather_columns<R, 1>(r, d, tokens, w);
  }

  template <int R, int W>
  void gather_columns(int32_t first, int64_t d, int32_t tokens, Scratch& w) const {
    const float* weights = w.scores.data + first * kTokens;
    float* to = w.sums.data + first * value_dim + d;
    Lanes sums[R][W];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < W; ++c) sums[r][c] = load_full(to + r * value_dim + c * kLanes);
    for (int32_t j = 0; j < tokens; ++j) {
      const T* row = static_cast<const T*>(w.rows.values[j]);
      Lanes value[W];
      for (int c = 0; c < W; ++c)
        value[c] = W > 1 ? load_full(row + d + c * kLanes) : load(row, d, a.value_dim);
      for (int r = 0; r < R; ++r) {
        const Lanes weight = splat(weights[r * kTokens + j]);
        for (int c = 0; c < W; ++c) sums[r][c] += weight * value[c];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < W; ++c) store(to + r * value_dim + c * kLanes, sums[r][c]);
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
