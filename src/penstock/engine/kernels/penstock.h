// The C interface of the kernels.  Each structure mirrors one of structures.py field by field.
#pragma once

#include <cstdint>

// Attention of a step over the paged cache.
struct PenstockAttention {
  const void* query;          // [tokens, heads, dim], last axis contiguous
  const void* key_cache;      // [blocks, kv_heads, block_size, dim], contiguous
  const void* value_cache;    // [blocks, kv_heads, block_size, value_dim], contiguous
  void* out;                  // [tokens, heads, value_dim], contiguous
  const int32_t* query_start; // [sequences + 1]
  const int32_t* context;     // [sequences]
  const int32_t* block_table; // [sequences, table_stride]
  const float* sinks;         // [heads] or null
  int64_t sequences, heads, kv_heads, dim, value_dim, block_size, table_stride;
  int64_t query_token_stride, query_head_stride;  // in elements
  int64_t window;   // 0: unlimited
  float scale;
  float softcap;    // 0: none
  int32_t threads;
  int32_t bfloat16; // 1: every tensor but sinks is bfloat16; 0: float32
};

// Rotary embedding of a step, and the KV store.
struct PenstockRotary {
  void* qkv;            // [tokens, qkv_stride]: queries, keys, values of all heads; queries change
  const void* cos;      // [tokens, dim]
  const void* sin;      // [tokens, dim]
  const void* q_norm;   // [dim] RMSNorm weights per head before the rotation, or null
  const void* k_norm;
  void* key_cache;      // [blocks, kv_heads, block_size, dim]
  void* value_cache;    // [blocks, kv_heads, block_size, dim]
  const int64_t* slots; // [tokens]
  int64_t tokens, heads, kv_heads, dim, block_size, qkv_stride;
  float eps;
  int32_t threads;
  int32_t bfloat16;
};

// A linear layer in bfloat16.
struct PenstockLinear {
  const uint16_t* weight;  // packed by penstock_pack
  const uint16_t* bias;    // [outputs] or null
  int64_t outputs, inputs;
};

// A decoder layer in bfloat16: what does not change from step to step.
struct PenstockLayer {
  PenstockLinear qkv, out, gate_up, down;
  const void* input_norm;  // [hidden]
  const void* post_norm;
  float input_eps, post_eps;
  PenstockRotary rotary;        // its caches, norms, head counts; the rest is filled in
  PenstockAttention attention;  // likewise
};

// What all layers share in a step.
struct PenstockStep {
  const void* cos;
  const void* sin;
  const int64_t* slots;
  const int32_t* query_start;
  const int32_t* context;
  const int32_t* block_table;
  int64_t tokens, sequences, table_stride;
  void* scratch;  // tokens * penstock_layer_scratch elements
  int64_t threads;
};

extern "C" {

// Returns 0, or 1 when memory ran out.
int penstock_attention(const PenstockAttention* call);

// Copies tokens x kv_heads rows of `width` bytes to their slots.  Strides are in bytes.
void penstock_store(const char* from, char* cache, const int64_t* slots, int64_t tokens,
                    int64_t kv_heads, int64_t block_size, int64_t width, int64_t token_stride,
                    int64_t head_stride);

// Rotates queries in place, and keys on their way into the cache; values are copied there.
void penstock_rotary(const PenstockRotary* call);

// out = x / rms(x) * weight, per row of `width`.
void penstock_rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t width,
                       float eps, int32_t threads, int32_t bfloat16);

// out[r][d] = silu(x[r][d]) * x[r][width + d]; rows of x are 2 * width.
void penstock_gated_silu(const void* x, void* out, int64_t rows, int64_t width, int32_t threads,
                         int32_t bfloat16);

// Whether this library multiplies bfloat16 matrices by itself.
int32_t penstock_has_linear();

// From [outputs, inputs] to panels; `inputs` is even, `packed` holds whole panels.
void penstock_pack(const uint16_t* weight, uint16_t* packed, int64_t outputs, int64_t inputs);

// out = x weight^T + bias + residual; bias and residual may be null, residual may be out.
// Returns 0, or 1 when memory ran out.
int penstock_linear(const PenstockLinear* layer, const void* x, const void* residual, void* out,
                    int64_t rows, int32_t threads);

// Elements of scratch memory that a layer needs per token.
int64_t penstock_layer_scratch(const PenstockLayer* layer);

// Runs a decoder layer on hidden[tokens, hidden size], in place.  Returns 0, or 1 when memory ran
// out.
int penstock_layer(const PenstockLayer* layer, const PenstockStep* step, void* hidden);

// Sizes of the structures, so that a library with another layout is refused.
int64_t penstock_attention_size();
int64_t penstock_rotary_size();
int64_t penstock_layer_size();
int64_t penstock_step_size();

}  // extern "C"
