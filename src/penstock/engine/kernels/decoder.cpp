// A whole decoder layer of the Llama kind in one call: at small batches the time between kernels
// is what is left to save.

#include "penstock.h"

namespace {

// Scratch memory holds, one after the other: the normalised input, queries, keys and values, the
// heads' results, the MLP's two inner halves, and their product.
struct Widths {
  int64_t hidden, qkv, heads, both, inner;
  explicit Widths(const PenstockLayer& a)
      : hidden(a.qkv.inputs), qkv(a.qkv.outputs), heads(a.out.inputs), both(a.gate_up.outputs),
        inner(a.down.inputs) {}
  int64_t total() const { return hidden + qkv + heads + both + inner; }
};

}  // namespace

extern "C" {

int64_t penstock_layer_scratch(const PenstockLayer* layer) { return Widths(*layer).total(); }

int penstock_layer(const PenstockLayer* layer, const PenstockStep* step, void* hidden) {
  const PenstockLayer& a = *layer;
  const Widths width(a);
  const int64_t tokens = step->tokens;
  const int32_t threads = static_cast<int32_t>(step->threads);
  uint16_t* normed = static_cast<uint16_t*>(step->scratch);
  uint16_t* qkv = normed + tokens * width.hidden;
  uint16_t* heads = qkv + tokens * width.qkv;
  uint16_t* both = heads + tokens * width.heads;
  uint16_t* inner = both + tokens * width.both;

  penstock_rms_norm(hidden, a.input_norm, normed, tokens, width.hidden, a.input_eps, threads, 1);
  if (penstock_linear(&a.qkv, normed, nullptr, qkv, tokens, threads)) return 1;

  PenstockRotary rotary = a.rotary;
  rotary.qkv = qkv;
  rotary.cos = step->cos;
  rotary.sin = step->sin;
  rotary.slots = step->slots;
  rotary.tokens = tokens;
  rotary.qkv_stride = width.qkv;
  rotary.threads = threads;
  penstock_rotary(&rotary);

  PenstockAttention attention = a.attention;
  attention.query = qkv;
  attention.out = heads;
  attention.query_start = step->query_start;
  attention.context = step->context;
  attention.block_table = step->block_table;
  attention.sequences = step->sequences;
  attention.table_stride = step->table_stride;
  attention.query_token_stride = width.qkv;
  attention.query_head_stride = attention.dim;
  attention.threads = threads;
  if (penstock_attention(&attention)) return 1;

  if (penstock_linear(&a.out, heads, hidden, hidden, tokens, threads)) return 1;
  penstock_rms_norm(hidden, a.post_norm, normed, tokens, width.hidden, a.post_eps, threads, 1);
  if (penstock_linear(&a.gate_up, normed, nullptr, both, tokens, threads)) return 1;
  penstock_gated_silu(both, inner, tokens, width.inner, threads, 1);
  return penstock_linear(&a.down, inner, hidden, hidden, tokens, threads);
}

int64_t penstock_layer_size() { return sizeof(PenstockLayer); }

int64_t penstock_step_size() { return sizeof(PenstockStep); }

}  // extern "C"
