// Linear layers in bfloat16 for CPUs with AVX-512 BF16: weights packed once into panels of 32
// outputs, each streamed through memory once per step.  Other CPUs use oneDNN; see linear.py.
//
// A panel holds, for each pair of inputs, the 32 weights of both: what VDPBF16PS multiplies by a
// broadcast pair of activations.  Up to 14 rows keep their sums in registers over the whole
// depth, so that a batch of that size costs little more than reading the weights.  Where there
// are more rows, each tile's activations are first laid out in the order in which they are read:
// rows that lie a power of two apart would push each other out of the cache.

#include "penstock.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t kPanel = 32;
constexpr int kMostRows = 14;
constexpr int64_t kParallel = 1 << 15;   // weights below which one thread is faster
constexpr int64_t kAhead = 64 * kPanel;  // elements to prefetch ahead: 4 KiB

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
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead + kPanel), _MM_HINT_T0);
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512bh activation = pair(kOrdered ? x + i * R + 2 * r : x + r * depth + i);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, activation);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, activation);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (to.residual)
      for (int half = 0; half < 2; ++half)
        sums[r][half] = _mm512_add_ps(
            sums[r][half],
            widened(to.residual + r * to.stride + 16 * half, to.mask >> (16 * half)));
    _mm512_mask_storeu_epi16(to.out + r * to.stride, to.mask,
                             (__m512i)_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0]));
  }
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

}  // namespace

extern "C" int32_t penstock_has_linear() { return 1; }

extern "C" void penstock_linear(const PenstockLinear* layer, const void* input,
                                const void* added, void* output, int64_t rows, int32_t threads) {
  const PenstockLinear& a = *layer;
  const uint16_t* x = static_cast<const uint16_t*>(input);
  const uint16_t* residual = static_cast<const uint16_t*>(added);
  uint16_t* out = static_cast<uint16_t*>(output);
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  const int64_t each = tiles ? (rows + tiles - 1) / tiles : 0;
  static thread_local std::vector<uint16_t> buffer;
  const bool reordered = tiles > 1;
  if (reordered && buffer.size() < static_cast<size_t>(rows * a.inputs))
    buffer.resize(rows * a.inputs);
  uint16_t* ordered = buffer.data();
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
        const int64_t row = t * each, count = std::min(each, rows - row), first = p * kPanel;
        const int64_t width = std::min(kPanel, a.outputs - first);
        const Output to = {a.bias ? a.bias + first : nullptr,
                           residual ? residual + row * a.outputs + first : nullptr,
                           out + row * a.outputs + first, a.outputs,
                           static_cast<uint32_t>((uint64_t{1} << width) - 1)};
        if (count <= 0) continue;
        const Tile run = (reordered ? kOrderedTiles : kTiles)[count - 1];
        run((reordered ? ordered : x) + row * a.inputs, a.weight + p * kPanel * a.inputs, a.inputs,
            t == 0, to);
      }
  }
}

#else

extern "C" int32_t penstock_has_linear() { return 0; }

extern "C" void penstock_linear(const PenstockLinear*, const void*, const void*, void*, int64_t,
                                int32_t) {}

#endif

extern "C" void penstock_pack(const uint16_t* weight, uint16_t* packed, int64_t outputs,
                              int64_t inputs) {
  for (int64_t n = 0; n < (outputs + 31) / 32 * 32; ++n)
    for (int64_t i = 0; i < inputs; ++i)
      packed[(n / 32 * inputs + i / 2 * 2) * 32 + n % 32 * 2 + i % 2] =
          n < outputs ? weight[n * inputs + i] : 0;
}
