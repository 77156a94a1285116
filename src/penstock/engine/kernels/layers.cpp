// What stands between a decoder layer's matrix products, one pass over memory each: RMSNorm,
// rotary embedding with the KV store, and the gated activation.  Arithmetic is float32; where
// Hugging Face's modules round to bfloat16 on the way matters only below bfloat16's own step.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "penstock.h"

namespace {

// Below this many elements, waking other threads costs more than they save.
constexpr int64_t kParallel = 1 << 15;

template <typename T>
inline void put(T* to, int64_t d, int64_t n, Lanes v) {
  if (d + kLanes <= n) {
    store(to + d, v);
    return;
  }
  T rest[kLanes];
  store(rest, v);
  std::memcpy(to + d, rest, (n - d) * sizeof(T));
}

template <typename T>
float root_mean_square(const T* x, int64_t n, float eps) {
  Lanes sum{};
  for (int64_t d = 0; d < n; d += kLanes) {
    const Lanes v = load(x, d, n);
    sum += v * v;
  }
  return 1.0f / std::sqrt(across(sum) / static_cast<float>(n) + eps);
}

template <typename T>
void normalize(const T* x, const T* weight, T* out, int64_t n, float eps) {
  const Lanes factor = splat(root_mean_square(x, n, eps));
  for (int64_t d = 0; d < n; d += kLanes)
    put(out, d, n, load(x, d, n) * factor * load(weight, d, n));
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width >= kParallel)
  for (int64_t r = 0; r < rows; ++r) normalize(x + r * width, weight, out + r * width, width, eps);
}

// x * sigmoid(x) * up
inline Lanes silu_times(Lanes x, Lanes up) {
  const Lanes e = exponential(x < 0.0f ? x : -x);
  const Lanes sigmoid = (x < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
  return x * sigmoid * up;
}

template <typename T>
void gated_silu(const T* x, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width >= kParallel)
  for (int64_t r = 0; r < rows; ++r) {
    const T* gate = x + r * 2 * width;
    for (int64_t d = 0; d < width; d += kLanes)
      put(out + r * width, d, width, silu_times(load(gate, d, width), load(gate + width, d, width)));
  }
}

// Turns pairs (x[d], x[d + half]) by the token's angles; `to` may be `x`.
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, T* to, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const Lanes low = load(x, d, half), high = load(x + half, d, half);
    put(to, d, half, low * load(cos, d, half) - high * load(sin, d, half));
    put(to + half, d, half, high * load(cos + half, d, half) + low * load(sin + half, d, half));
  }
}

template <typename T>
void rotate_and_store(const PenstockRotary& a, int64_t token) {
  T* row = static_cast<T*>(a.qkv) + token * a.qkv_stride;
  const T* cos = static_cast<const T*>(a.cos) + token * a.dim;
  const T* sin = static_cast<const T*>(a.sin) + token * a.dim;
  const int64_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size;
  for (int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
    T* x = row + h * a.dim;
    const void* norm = h < a.heads ? a.q_norm : a.k_norm;
    if (norm) normalize(x, static_cast<const T*>(norm), x, a.dim, a.eps);
    T* to = x;
    if (h >= a.heads)
      to = static_cast<T*>(a.key_cache) +
           ((block * a.kv_heads + h - a.heads) * a.block_size + offset) * a.dim;
    rotate(x, cos, sin, to, a.dim);
  }
  const T* value = row + (a.heads + a.kv_heads) * a.dim;
  for (int64_t h = 0; h < a.kv_heads; ++h)
    std::memcpy(static_cast<T*>(a.value_cache) +
                    ((block * a.kv_heads + h) * a.block_size + offset) * a.dim,
                value + h * a.dim, a.dim * sizeof(T));
}

template <typename T>
void rotary(const PenstockRotary& a) {
  const int64_t work = a.tokens * (a.heads + 2 * a.kv_heads) * a.dim;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1 && work >= kParallel)
  for (int64_t t = 0; t < a.tokens; ++t) rotate_and_store<T>(a, t);
}

}  // namespace

extern "C" {

void penstock_rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t width,
                       float eps, int32_t threads, int32_t bfloat16) {
  if (bfloat16)
    rms_norm(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(weight),
             static_cast<BFloat16*>(out), rows, width, eps, threads);
  else
    rms_norm(static_cast<const float*>(x), static_cast<const float*>(weight),
             static_cast<float*>(out), rows, width, eps, threads);
}

void penstock_gated_silu(const void* x, void* out, int64_t rows, int64_t width, int32_t threads,
                         int32_t bfloat16) {
  if (bfloat16)
    gated_silu(static_cast<const BFloat16*>(x), static_cast<BFloat16*>(out), rows, width, threads);
  else
    gated_silu(static_cast<const float*>(x), static_cast<float*>(out), rows, width, threads);
}

void penstock_rotary(const PenstockRotary* call) {
  if (call->bfloat16)
    rotary<BFloat16>(*call);
  else
    rotary<float>(*call);
}

int64_t penstock_rotary_size() { return sizeof(PenstockRotary); }

}  // extern "C"
