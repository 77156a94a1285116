"""A random Llama of about 14 million parameters that says words and never stops by itself.

Weights do not matter for a scheduling experiment, the cost of a step does: a step of
the included model is so short that HTTP, not the engine, would be what is measured.
Rows of the output head that belong to special tokens and to pieces of UTF-8 characters are
zero, so with greedy decoding each token is printable text and reaches the client at once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from penstock.models import demo_path

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 384, 8, 8, 4, 1024
HEAD_DIM = HIDDEN // HEADS
SEED = 7
NAME = "random-llama-14m"


def build(folder: Path) -> Path:
    """Write the model into ``folder``, unless it is there already."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    source = demo_path()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INNER,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    save_file(_weights(config["vocab_size"], tokenizer), folder / "model.safetensors")
    return folder


def _weights(vocabulary: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)

    def draw(rows: int, columns: int) -> np.ndarray:
        scale = columns**-0.5
        return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)

    head = draw(vocabulary, HIDDEN)
    for token in range(vocabulary):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if not text or "\ufffd" in text:
            head[token] = 0
    weights = {
        "model.embed_tokens.weight": draw(vocabulary, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": np.ones(HIDDEN, dtype=np.float32),
        "lm_head.weight": head,
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": np.ones(HIDDEN, dtype=np.float32),
            layer + "post_attention_layernorm.weight": np.ones(HIDDEN, dtype=np.float32),
            layer + "self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            layer + "mlp.gate_proj.weight": draw(INNER, HIDDEN),
            layer + "mlp.up_proj.weight": draw(INNER, HIDDEN),
            layer + "mlp.down_proj.weight": draw(HIDDEN, INNER),
        }
    return weights
