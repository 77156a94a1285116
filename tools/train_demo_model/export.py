"""Write a trained model as a Hugging Face folder: bf16 weights, configs, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from vocabulary import BOS, EOS, PAD, save_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_ROLES = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}

# What describes the model; the rest of the configuration is the library's defaults of the day.
_KEPT = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write every file that ``from_pretrained`` needs; each one replaces its elder whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    partial = folder / "model.safetensors.partial"
    save_file(weights, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")
    config = model.config.to_dict()
    chosen = {name: config[name] for name in _KEPT}
    chosen |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    # Readers older than ``rope_parameters`` look for this name.
    chosen["rope_theta"] = config["rope_parameters"]["rope_theta"]
    _write_json(folder / "config.json", chosen)
    generation: dict[str, object] = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
    generation |= {name: tokenizer.token_to_id(token) for name, token in _ROLES.items()}
    _write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
