// Linear layers in bfloat16 for CPUs with AVX-512 BF16: weights packed once into panels of 32
// outputs, each streamed through memory once per step, or once per 256 rows where a step has more.
// Other CPUs use oneDNN; see linear.py.
//
// A panel holds, for each pair of inputs, the 32 weights of both: what VDPBF16PS multiplies by a
// broadcast pair of activations.  Up to 14 rows keep their sums in registers over the whole
// depth, so that a batch of that size costs little more than reading the weights.  Where there
// are more rows, each tile's activations are first laid out in the order in which they are read:
// rows that lie a power of two apart would push each other out of the cache.
//
// Where the CPU has AMX, more than a few rows are multiplied in its tiles, 32 rows by a panel at a
// time: VDPBF16PS runs at half rate there, AMX at eight times that. A panel happens to be two AMX
// tiles side by side, so the weights are the same.  Tiles are fed from the L1 alone at full rate,
// so where more than 32 rows pass by a panel it is taken a stretch of inputs at a time, with the
// sums set aside meanwhile, and the next stretch is asked for in small portions all along.

#include "lanes.h"
#include "penstock.h"
#include "tiles.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t kPanel = 32;
constexpr int kMostRows = 14;
constexpr int64_t kParallel = 1 << 15;   // weights below which one thread is faster
// Elements to prefetch ahead, and into which cache: each measured on the CPUs that it is for.  What
// is on its way to Intel's L1 holds one of few buffers until it has come.
#ifdef PENSTOCK_TILES
constexpr int64_t kAhead = 128 * kPanel;
constexpr auto kInto = _MM_HINT_T1;
#else
constexpr int64_t kAhead = 64 * kPanel;
constexpr auto kInto = _MM_HINT_T0;
#endif

inline __m512bh pair(const uint16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

inline __m512 widened(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

struct Output {
  const uint16_t* bias;      // of the panel's first output, or null
  const uint16_t* residual;  // row 0, the panel's first output, or null
  uint16_t* out;
  int64_t stride;
  uint32_t mask;  // which of the panel's outputs exist
};

// Adds the residual to the sums of row r, and writes them.
inline void finish(int64_t r, __m512 low, __m512 high, const Output& to) {
  if (to.residual) {
    const uint16_t* more = to.residual + r * to.stride;
    low = _mm512_add_ps(low, widened(more, to.mask));
    high = _mm512_add_ps(high, widened(more + 16, to.mask >> 16));
  }
  _mm512_mask_storeu_epi16(to.out + r * to.stride, to.mask,
                           (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Ordered: the pairs of all rows for input 0, then for input 2, and so on; else row by row.
template <int R, bool kOrdered>
void tile(const uint16_t* x, const uint16_t* panel, int64_t depth, bool prefetch,
          const Output& to) {
  __m512 sums[R][2];
  for (int half = 0; half < 2; ++half) {
    const __m512 bias = to.bias ? widened(to.bias + 16 * half, to.mask >> (16 * half))
                                : _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) sums[r][half] = bias;
  }
  for (int64_t i = 0; i < depth; i += 2) {
    const uint16_t* weights = panel + i * kPanel;
    const __m512bh low = (__m512bh)_mm512_loadu_si512(weights);
    const __m512bh high = (__m512bh)_mm512_loadu_si512(weights + kPanel);
    if (prefetch) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead), kInto);
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead + kPanel), kInto);
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512bh activation = pair(kOrdered ? x + i * R + 2 * r : x + r * depth + i);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, activation);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, activation);
    }
  }
  for (int r = 0; r < R; ++r) finish(r, sums[r][0], sums[r][1], to);
}

using Tile = void (*)(const uint16_t*, const uint16_t*, int64_t, bool, const Output&);

template <bool kOrdered, int... R>
constexpr std::array<Tile, kMostRows> tiles_of(std::integer_sequence<int, R...>) {
  return {tile<R + 1, kOrdered>...};
}

constexpr auto kTiles = tiles_of<false>(std::make_integer_sequence<int, kMostRows>());
constexpr auto kOrderedTiles = tiles_of<true>(std::make_integer_sequence<int, kMostRows>());

void reorder(const uint16_t* x, int64_t rows, int64_t depth, uint16_t* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < depth; i += 2)
      std::memcpy(to + i * rows + 2 * r, x + r * depth + i, 2 * sizeof *x);
}

#ifdef PENSTOCK_TILES

constexpr int64_t kFewRows = 2;  // up to here VDPBF16PS keeps up with memory
constexpr int64_t kAtOnce = 2 * kTileRows;
constexpr int64_t kStretch = 256;       // inputs of a panel and of 32 rows that fit the L1
constexpr int64_t kMostRowsPast = 256;  // whose activations stay in the L2, up to 4,096 inputs

// Rows of one tile, for 32 inputs at a time; rows that do not exist are 0.
void lay_out(const uint16_t* x, int64_t rows, int64_t depth, uint16_t* to) {
  const __m512i nothing = _mm512_setzero_si512();
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t i = 0; i < depth; i += kTileInputs)
      _mm512_storeu_si512(to + i * kTileRows + r * kTileInputs,
                          r < rows ? _mm512_loadu_si512(x + r * depth + i) : nothing);
}

// Of 32 rows and a panel.
struct alignas(64) Sums {
  float tile[2][2][kTileRows][16];  // [which 16 rows][which 16 outputs]
};

// What to ask memory for meanwhile.
struct Ahead {
  const uint16_t* next;
  int64_t lines;  // for each 32 inputs
};

// Sums of up to 32 rows and a panel over a stretch of inputs; `second` are rows 16 to 31.
template <bool kTwo>
void multiply_stretch(const uint16_t* x, const uint16_t* second, const uint16_t* weights,
                      int64_t inputs, bool first, Ahead& ahead, Sums& sums) {
  tiles_see_memory();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums.tile[0][0], 64);
    _tile_loadd(1, sums.tile[0][1], 64);
    if (kTwo) {
      _tile_loadd(2, sums.tile[1][0], 64);
      _tile_loadd(3, sums.tile[1][1], 64);
    }
  }
  for (int64_t i = 0; i < inputs; i += kTileInputs, weights += kTileInputs * kPanel) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.next += kPanel)
      _mm_prefetch(reinterpret_cast<const char*>(ahead.next), kInto);
    _tile_loadd(4, x + i * kTileRows, 2 * kTileInputs);
    _tile_loadd(6, weights, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kPanel, 4 * kPanel);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) {
      _tile_loadd(5, second + i * kTileRows, 2 * kTileInputs);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums.tile[0][0], 64);
  _tile_stored(1, sums.tile[0][1], 64);
  if (kTwo) {
    _tile_stored(2, sums.tile[1][0], 64);
    _tile_stored(3, sums.tile[1][1], 64);
  }
}

void write(const Sums& sums, int64_t rows, const Output& to) {
  __m512 bias[2];
  for (int half = 0; half < 2; ++half)
    bias[half] = to.bias ? widened(to.bias + 16 * half, to.mask >> (16 * half))
                         : _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; ++r) {
    const auto& tile = sums.tile[r / kTileRows];
    const int64_t at = r % kTileRows;
    finish(r, _mm512_add_ps(bias[0], _mm512_load_ps(tile[0][at])),
           _mm512_add_ps(bias[1], _mm512_load_ps(tile[1][at])), to);
  }
}

#endif

Output output_of(const PenstockLinear& layer, const uint16_t* residual, uint16_t* out, int64_t row,
                 int64_t panel) {
  const int64_t first = panel * kPanel, width = std::min(kPanel, layer.outputs - first);
  return {layer.bias ? layer.bias + first : nullptr,
          residual ? residual + row * layer.outputs + first : nullptr,
          out + row * layer.outputs + first, layer.outputs,
          static_cast<uint32_t>((uint64_t{1} << width) - 1)};
}

uint16_t* working_memory(int64_t elements) {
  static thread_local std::unique_ptr<Halves> buffer;
  static thread_local int64_t size = 0;
  if (size < elements) {
    size = 0;
    buffer.reset();
    buffer = std::make_unique<Halves>(elements);
    size = elements;
  }
  return buffer->data;
}

#ifdef PENSTOCK_TILES

// A call's rows `from` up to `until`, in the order of tiles, past a panel.
void pass_panel(const PenstockLinear& a, const uint16_t* ordered, const uint16_t* residual,
                uint16_t* out, int64_t from, int64_t until, int64_t p, Sums* sums) {
  const int64_t pairs = (until - from + kAtOnce - 1) / kAtOnce;
  const int64_t stretch = pairs == 1 ? a.inputs : kStretch;
  const int64_t lines = (kTileInputs + pairs - 1) / pairs;
  const uint16_t* panel = a.weight + p * kPanel * a.inputs;
  for (int64_t i = 0; i < a.inputs; i += stretch) {
    const int64_t inputs = std::min(stretch, a.inputs - i), end = i + inputs;
    Ahead ahead{panel + (pairs == 1 ? kAhead : end * kPanel), lines};
    for (int64_t t = 0; t < pairs; ++t) {
      const int64_t row = from + t * kAtOnce, count = std::min(kAtOnce, until - row);
      const uint16_t* x = ordered + row * a.inputs + i * kTileRows;
      const auto run = count > kTileRows ? multiply_stretch<true> : multiply_stretch<false>;
      run(x, x + kTileRows * a.inputs, panel + i * kPanel, inputs, i == 0, ahead, sums[t]);
      if (end == a.inputs) write(sums[t], count, output_of(a, residual, out, row, p));
    }
  }
}

void linear_in_tiles(const PenstockLinear& a, const uint16_t* x, const uint16_t* residual,
                     uint16_t* out, int64_t rows, int32_t threads) {
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, pairs = (tiles + 1) / 2;
  uint16_t* ordered = working_memory(tiles * kTileRows * a.inputs);
  // As few parts of the rows as stay in the cache, and as keep all threads busy.
  const int64_t needed = (rows + kMostRowsPast - 1) / kMostRowsPast;
  const int64_t busy = std::min(pairs, (threads + panels - 1) / panels);
  const int64_t each = (pairs + std::max(needed, busy) - 1) / std::max(needed, busy) * kAtOnce;
#pragma omp parallel num_threads(threads) if (threads > 1 && a.outputs * a.inputs >= kParallel)
  {
    configure_tiles();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t)
      lay_out(x + t * kTileRows * a.inputs, std::min(kTileRows, rows - t * kTileRows), a.inputs,
              ordered + t * kTileRows * a.inputs);
    Sums sums[kMostRowsPast / kAtOnce];
#pragma omp for collapse(2) schedule(static)
    for (int64_t from = 0; from < rows; from += each)
      for (int64_t p = 0; p < panels; ++p)
        pass_panel(a, ordered, residual, out, from, std::min(rows, from + each), p, sums);
    release_tiles();
  }
}

#endif

}  // namespace

extern "C" int32_t penstock_has_linear() { return 1; }

namespace {

void linear(const PenstockLinear& a, const void* input, const void* added, void* output,
            int64_t rows, int32_t threads) {
  const uint16_t* x = static_cast<const uint16_t*>(input);
  const uint16_t* residual = static_cast<const uint16_t*>(added);
  uint16_t* out = static_cast<uint16_t*>(output);
#ifdef PENSTOCK_TILES
  if (rows > kFewRows && a.inputs % kTileInputs == 0 && tiles_allowed()) {
    linear_in_tiles(a, x, residual, out, rows, threads);
    return;
  }
#endif
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  const int64_t each = tiles ? (rows + tiles - 1) / tiles : 0;
  const bool reordered = tiles > 1;
  uint16_t* ordered = reordered ? working_memory(rows * a.inputs) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1 && a.outputs * a.inputs >= kParallel)
  {
    if (reordered) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tiles; ++t)
        reorder(x + t * each * a.inputs, std::min(each, rows - t * each), a.inputs,
                ordered + t * each * a.inputs);
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = t * each, count = std::min(each, rows - row);
        if (count <= 0) continue;
        const Tile run = (reordered ? kOrderedTiles : kTiles)[count - 1];
        run((reordered ? ordered : x) + row * a.inputs, a.weight + p * kPanel * a.inputs, a.inputs,
            t == 0, output_of(a, residual, out, row, p));
      }
  }
}

}  // namespace

extern "C" int penstock_linear(const PenstockLinear* layer, const void* x, const void* residual,
                               void* out, int64_t rows, int32_t threads) {
  try {
    linear(*layer, x, residual, out, rows, threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

#else

extern "C" int32_t penstock_has_linear() { return 0; }

extern "C" int penstock_linear(const PenstockLinear*, const void*, const void*, void*, int64_t,
                               int32_t) {
  return 1;
}

#endif

extern "C" void penstock_pack(const uint16_t* weight, uint16_t* packed, int64_t outputs,
                              int64_t inputs) {
  for (int64_t n = 0; n < (outputs + 31) / 32 * 32; ++n)
    for (int64_t i = 0; i < inputs; ++i)
      packed[(n / 32 * inputs + i / 2 * 2) * 32 + n % 32 * 2 + i % 2] =
          n < outputs ? weight[n * inputs + i] : 0;
}
