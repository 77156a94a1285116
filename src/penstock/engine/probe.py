"""One short forward pass that shows how a model calls its attention.

Some old models compute attention by themselves and never call the registered function;
without this they would run, and answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from penstock.engine.attention import attach, detach
from penstock.engine.errors import UnsupportedModelError
from penstock.engine.support import layer_windows, token_limit

_KNOWN = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
# Passed along by many models without a bearing on the result of inference.
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "cache_position", "output_attentions", "use_cache"}
)
_PROBE_TOKENS = 3


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention layer of a model.

    Attributes:
        module: what calls the attention function.
        kv_heads: key and value heads.
        key_dim, value_dim: widths of a head's keys and values.
        dtype: of the values, and so of the cache.
    """

    module: nn.Module
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Probed:
    """What the forward pass showed.

    Attributes:
        sites: the attention layers, in the order in which they are called.
        logits: width of the logits.
    """

    sites: tuple[AttentionSite, ...]
    logits: int


class _Recorder:
    """Stands behind every module of a model, and writes down who calls."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type
        self.sites: list[AttentionSite] = []
        self.windows: list[int | None] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **keywords: Any,
    ) -> Tensor:
        if mask is not None:
            self._refuse("it builds an attention mask of its own")
        if not (keywords.get("is_causal", True) and getattr(module, "is_causal", True)):
            self._refuse("its attention is not causal")
        for name, setting in keywords.items():
            if name not in _KNOWN | _HARMLESS and isinstance(setting, Tensor):
                self._refuse(f"its attention depends on {name}")
        self.windows.append(keywords.get("sliding_window"))
        self.sites.append(
            AttentionSite(module, key.shape[1], key.shape[3], value.shape[3], value.dtype)
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def _refuse(self, reason: str) -> None:
        raise UnsupportedModelError(self._model_type, reason)


def probe(model: PreTrainedModel) -> Probed:
    """Find a model's attention layers.

    Raises:
        UnsupportedModelError: they are not called exactly once each, or not in a way that
            we know how to serve.
    """
    kind = model.config.model_type
    recorder = _Recorder(kind)
    for module in model.modules():
        attach(module, recorder)
    tokens = torch.zeros((1, _PROBE_TOKENS), dtype=torch.int64, device=model.device)
    positions = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    try:
        with torch.inference_mode():
            logits = model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=torch.tensor([_PROBE_TOKENS - 1], device=model.device),
            ).logits
    except (TypeError, AttributeError) as error:
        raise UnsupportedModelError(kind, f"its forward pass fails: {error}") from error
    finally:
        for module in model.modules():
            detach(module)
    if logits.shape[:2] != (1, 1):
        raise UnsupportedModelError(kind, "it cannot compute the logits of chosen tokens only")
    _check(kind, recorder.sites, model.config.num_hidden_layers)
    _check_windows(recorder.windows, model.config)
    return Probed(tuple(recorder.sites), logits.shape[-1])


def _check(kind: str, sites: Sequence[AttentionSite], layers: int) -> None:
    distinct = len({id(site.module) for site in sites})
    if distinct != len(sites) or len(sites) != layers:
        reason = (
            f"its {layers} layers called the attention function {len(sites)} times "
            f"from {distinct} places; it must be once per layer"
        )
        raise UnsupportedModelError(kind, reason)


def _check_windows(seen: Sequence[int | None], config: PreTrainedConfig) -> None:
    limit = token_limit(config)
    longest = math.inf if limit is None else limit.tokens
    for layer, (given, due) in enumerate(zip(seen, layer_windows(config), strict=True)):
        # A window as long as the longest request is none.
        if min(given or math.inf, longest) != min(due or math.inf, longest):
            reason = (
                f"layer {layer} passes sliding_window={given} to its attention, "
                f"but its configuration says {due}"
            )
            raise UnsupportedModelError(config.model_type, reason)
