"""A random Llama of 14 or 32 million parameters that says words and never stops by itself.

Weights do not matter for a scheduling experiment, the cost of a step does: a step of
the included model is so short that HTTP, not the engine, would be what is measured.
Rows of the output head that belong to special tokens and to pieces of UTF-8 characters are
zero, so with greedy decoding each token is printable text and reaches the client at once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from penstock.models import demo_path

SEED = 7


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int

    @property
    def head_dim(self) -> int:
        """Of keys and values."""
        return self.hidden // self.heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Of float32 KV."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4

    @property
    def folder(self) -> Path:
        """Where it is kept between runs."""
        return Path(tempfile.gettempdir()) / f"penstock-{self.name}"


M14 = Shape("random-llama-14m", hidden=384, layers=8, heads=8, kv_heads=4, inner=1024)
M32 = Shape("random-llama-32m", hidden=512, layers=8, heads=8, kv_heads=4, inner=1408)


def build(shape: Shape = M14) -> Path:
    """Write the model into its folder, unless it is there already; the folder."""
    folder = shape.folder
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    source = demo_path()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.inner,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    weights = _weights(shape, config["vocab_size"], tokenizer)
    save_file(weights, folder / "model.safetensors")
    return folder


def _weights(shape: Shape, vocabulary: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)
    hidden, inner = shape.hidden, shape.inner
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def draw(rows: int, columns: int) -> np.ndarray:
        scale = columns**-0.5
        return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)

    head = draw(vocabulary, hidden)
    for token in range(vocabulary):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if not text or "\ufffd" in text:
            head[token] = 0
    weights = {
        "model.embed_tokens.weight": draw(vocabulary, hidden) * hidden**0.5,
        "model.norm.weight": np.ones(hidden, dtype=np.float32),
        "lm_head.weight": head,
    }
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": np.ones(hidden, dtype=np.float32),
            layer + "post_attention_layernorm.weight": np.ones(hidden, dtype=np.float32),
            layer + "self_attn.q_proj.weight": draw(queries, hidden),
            layer + "self_attn.k_proj.weight": draw(keys, hidden),
            layer + "self_attn.v_proj.weight": draw(keys, hidden),
            layer + "self_attn.o_proj.weight": draw(hidden, queries),
            layer + "mlp.gate_proj.weight": draw(inner, hidden),
            layer + "mlp.up_proj.weight": draw(inner, hidden),
            layer + "mlp.down_proj.weight": draw(hidden, inner),
        }
    return weights
