"""Which models run here correctly, told from their configuration alone.

What a configuration cannot tell, :mod:`penstock.engine.probe` finds out from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from penstock.engine.errors import UnsupportedModelError

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose whole state is the keys and values of earlier tokens."""

TESTED_TYPES = frozenset(
    """
    apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_neox gpt_oss granite granitemoe helium llama llama4_text
    minimax_m2 ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open
    starcoder2
    """.split()
)
"""Model types whose output is known to equal that of transformers' own attention."""

_SIDE_CONFIGS = ("vision_config", "audio_config", "speech_config", "encoder_config")
_SIZE_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """Most tokens (prompt plus output) of a request, and what sets the limit."""

    tokens: int
    reason: str


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what needs more than a causal decoder with KV pages.

    Raises:
        UnsupportedModelError: with the reason.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(kind, "it is an encoder-decoder model")
    for name in _SIDE_CONFIGS:
        if getattr(config, name, None) is not None:
            raise UnsupportedModelError(kind, f"it is multimodal (it has a {name})")
    # A published layout of layers wins over the type's name: hybrids exist without recurrence.
    for layer_type in getattr(config, "layer_types", None) or ():
        if layer_type not in LAYER_TYPES:
            reason = f"its {layer_type} layers need state other than KV blocks"
            raise UnsupportedModelError(kind, reason)
    if getattr(config, "use_bidirectional_attention", None) in {True, "all"}:
        raise UnsupportedModelError(kind, "its attention is bidirectional")
    if getattr(config, "alibi", False):
        raise UnsupportedModelError(kind, "its attention adds ALiBi biases")


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer, as transformers' mask for it would have it."""
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None) or ()
    if not types:
        return [window] * count
    return [window if kind == "sliding_attention" else None for kind in types]


def token_limit(config: PreTrainedConfig) -> TokenLimit | None:
    """The longest request that the model computes correctly here; None: no limit is known."""
    return min(_limits(config), key=lambda limit: limit.tokens, default=None)


def _limits(config: PreTrainedConfig) -> Iterator[TokenLimit]:
    for name in _SIZE_NAMES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size > 0:
            yield TokenLimit(size, f"the model's {name}")
    for rope in _ropes(config):
        if rope.get("rope_type") in {"dynamic", "longrope"}:
            # These choose frequencies by the longest sequence of a batch, so that a request's
            # tokens would depend on its neighbours.  Below the original length nothing is chosen.
            size = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            yield TokenLimit(int(size), f"the original length of its {rope['rope_type']} rope")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        # Within the first chunk, chunked attention is plain causal attention.
        yield TokenLimit(config.attention_chunk_size, "its attention_chunk_size")
    if getattr(config, "attn_temperature_tuning", False):
        # transformers derives the temperature from a token's place in the packed batch; below
        # floor_scale it is 1 for all.
        yield TokenLimit(int(config.floor_scale) - 1, "its attention temperature's floor_scale")


def step_limit(config: PreTrainedConfig) -> TokenLimit | None:
    """The longest packed batch that the model computes correctly; None: any."""
    if getattr(config, "attn_temperature_tuning", False):
        return TokenLimit(int(config.floor_scale) - 1, "its attention temperature's floor_scale")
    return None


def _ropes(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rope parameters of the model, or of each of its layer types."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return
    if "rope_type" in rope:
        yield rope
    else:
        yield from (part for part in rope.values() if isinstance(part, Mapping))
