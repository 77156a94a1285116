// Sixteen floats at a time, without intrinsics: what attention and the layer operations are made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

constexpr int kLanes = 16;

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct AlignedFloats {
  float* data;
  explicit AlignedFloats(int64_t count) {
    data = static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64));
    if (!data) throw std::bad_alloc();
  }
  ~AlignedFloats() { std::free(data); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
};

struct Halves {
  uint16_t* data;
  explicit Halves(int64_t count) : memory_((count + 1) / 2) {
    data = reinterpret_cast<uint16_t*>(memory_.data);
  }

 private:
  AlignedFloats memory_;
};

inline Lanes splat(float x) { return Lanes{} + x; }

inline Lanes load_full(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Lanes load_full(const BFloat16* from) {
  HalfLanes half;
  std::memcpy(&half, from, sizeof half);
  return reinterpret_cast<Lanes>(__builtin_convertvector(half, WordLanes) << 16);
}

inline void store(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

inline void store(BFloat16* to, Lanes v) {
  WordLanes bits = reinterpret_cast<WordLanes>(v);
  // Round to nearest even; a NaN keeps a mantissa bit, else it would round to infinity.
  WordLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  WordLanes nan = (bits >> 16) | 0x40u;
  WordLanes out = v == v ? rounded : nan;
  HalfLanes half = __builtin_convertvector(out, HalfLanes);
  std::memcpy(to, &half, sizeof half);
}

// from[d .. d + 16), zeros past n.
template <typename T>
inline Lanes load(const T* from, int64_t d, int64_t n) {
  if (d + kLanes <= n) return load_full(from + d);
  T padded[kLanes] = {};
  std::memcpy(padded, from + d, (n - d) * sizeof(T));
  return load_full(padded);
}

template <typename T>
inline void widen(const T* from, float* to, int64_t n, int64_t padded, float scale) {
  for (int64_t d = 0; d < padded; d += kLanes) store(to + d, load(from, d, n) * splat(scale));
}

template <typename T>
inline void narrow(const float* from, T* to, int64_t n, float scale) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, load_full(from + d) * splat(scale));
  if (d < n) {
    T rest[kLanes];
    store(rest, load_full(from + d) * splat(scale));
    std::memcpy(to + d, rest, (n - d) * sizeof(T));
  }
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

#if defined(__clang__) || __GNUC__ >= 12
#define PENSTOCK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PENSTOCK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntLanes){__VA_ARGS__})
#endif

// Lane i + n, for n = 8, 4, 2, 1: after all four steps every lane holds the whole result.
#define PENSTOCK_FOLD(v, step)                                                                  \
  do {                                                                                          \
    v = step(v, PENSTOCK_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));  \
    v = step(v, PENSTOCK_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));  \
    v = step(v, PENSTOCK_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));  \
    v = step(v, PENSTOCK_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));  \
  } while (0)

inline Lanes sum_of(Lanes a, Lanes b) { return a + b; }

inline float across(Lanes v) {
  PENSTOCK_FOLD(v, sum_of);
  return v[0];
}

inline float largest(Lanes v) {
  PENSTOCK_FOLD(v, larger);
  return v[0];
}

// Lane i of the result is the sum over the lanes of m[i].  Each merge keeps half of either
// vector in place and brings in the other halves, so that only one operand needs a shuffle.
inline Lanes row_sums(Lanes* m) {
  for (int i = 0; i < 8; ++i)
    m[i] = PENSTOCK_SHUFFLE(m[i], m[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
           PENSTOCK_SHUFFLE(m[i], m[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                            23);
  for (int i = 0; i < 4; ++i)
    m[i] = PENSTOCK_SHUFFLE(m[i], m[i + 4], 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
           PENSTOCK_SHUFFLE(m[i], m[i + 4], 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26,
                            27);
  for (int i = 0; i < 2; ++i)
    m[i] = PENSTOCK_SHUFFLE(m[i], m[i + 2], 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
           PENSTOCK_SHUFFLE(m[i], m[i + 2], 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28,
                            29);
  return PENSTOCK_SHUFFLE(m[0], m[1], 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
         PENSTOCK_SHUFFLE(m[0], m[1], 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
}

// e^x for x <= 0, within 2 ulp; 0 below -87 (where float32 runs out of normal numbers).
inline Lanes exponential(Lanes x) {
  const IntLanes n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, IntLanes);
  const Lanes whole = __builtin_convertvector(n, Lanes);
  const Lanes r = x - whole * 0.693145751953125f - whole * 1.42860682030941723212e-6f;
  Lanes p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Lanes power = reinterpret_cast<Lanes>((n + 127) << 23);
  return x > -87.0f ? p * power : Lanes{};
}

// 16 x 16, in four rounds of pairwise exchange.
inline void transpose(Lanes* m) {
  Lanes t[kLanes];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = PENSTOCK_SHUFFLE(m[i], m[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                7, 23);
    t[2 * i + 1] = PENSTOCK_SHUFFLE(m[i], m[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                    14, 30, 15, 31);
  }
  for (int i = 0; i < 8; ++i) {
    m[2 * i] = PENSTOCK_SHUFFLE(t[i], t[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                7, 23);
    m[2 * i + 1] = PENSTOCK_SHUFFLE(t[i], t[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                    14, 30, 15, 31);
  }
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = PENSTOCK_SHUFFLE(m[i], m[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                7, 23);
    t[2 * i + 1] = PENSTOCK_SHUFFLE(m[i], m[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                    14, 30, 15, 31);
  }
  for (int i = 0; i < 8; ++i) {
    m[2 * i] = PENSTOCK_SHUFFLE(t[i], t[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                7, 23);
    m[2 * i + 1] = PENSTOCK_SHUFFLE(t[i], t[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                    14, 30, 15, 31);
  }
}

// A tile of c[R][W*16] (+)= a[R][k] b[k][W*16], sums kept in registers.
template <bool kAdd, int R, int W>
inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k,
                          float* c, int64_t ldc) {
  Lanes sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w)
      sum[r][w] = kAdd ? load_full(c + r * ldc + w * kLanes) : Lanes{};
  for (int64_t i = 0; i < k; ++i) {
    Lanes row[W];
    for (int w = 0; w < W; ++w) row[w] = load_full(b + i * ldb + w * kLanes);
    for (int r = 0; r < R; ++r) {
      const Lanes x = splat(a[r * lda + i]);
      for (int w = 0; w < W; ++w) sum[r][w] += x * row[w];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store(c + r * ldc + w * kLanes, sum[r][w]);
}

template <bool kAdd, int W>
inline void multiply_columns(const float* a, int64_t lda, const float* b, int64_t ldb,
                             int64_t rows, int64_t k, float* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    multiply_tile<kAdd, 4, W>(a + r * lda, lda, b, ldb, k, c + r * ldc, ldc);
  for (; r < rows; ++r)
    multiply_tile<kAdd, 1, W>(a + r * lda, lda, b, ldb, k, c + r * ldc, ldc);
}

// c[rows][columns] (+)= a[rows][k] b[k][columns]; columns = ldc, whole Lanes.
template <bool kAdd>
inline void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                     int64_t k, float* c, int64_t ldc) {
  int64_t w = 0;
  for (; w + 4 * kLanes <= ldc; w += 4 * kLanes)
    multiply_columns<kAdd, 4>(a, lda, b + w, ldb, rows, k, c + w, ldc);
  for (; w < ldc; w += kLanes)
    multiply_columns<kAdd, 1>(a, lda, b + w, ldb, rows, k, c + w, ldc);
}

}  // namespace
