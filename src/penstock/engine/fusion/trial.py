"""Whether two forward passes of a module compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.attention import PagedLayer, Stage, attach, detach
from penstock.engine.kernels import PagedBatch

Forward = Callable[..., Any]

TOKENS = 5
"""Length of the random input."""

# Small values show what epsilon does, large ones where an activation is clamped.
_MAGNITUDES = (1e-3, 0.3, 1.0, 3.0, 30.0)


def equal(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether a module that maps ``[..., width]`` has an equal in another forward."""
    dtype = next(module.parameters()).dtype
    inputs = [(torch.randn(1, TOKENS, width) * size).to(dtype) for size in _MAGNITUDES]
    return all(close(forward(x), module.forward(x)) for x in inputs)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: relative to the largest value, as sums lose it."""
    step = 2.0**-6 if a.dtype is torch.bfloat16 else 2.0**-17
    bound = step * max(float(b.abs().max()), torch.finfo(torch.float32).tiny)
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= bound).all())


class _Listener(PagedLayer):
    """Notes what a module hands to the attention function."""

    keywords: Mapping[str, Any] = {}

    def attend(self, *tensors: Any, **keywords: Any) -> Tensor:
        self.keywords = keywords
        return super().attend(*tensors, **keywords)


class PagedTrial:
    """What a module that attends does with random input, to compare other forwards with.

    Args:
        forward: the module's own.
        inputs: what it takes; see :func:`layer_inputs`.
        sites: the attention modules it runs.
        heads: how many KV heads each has, and their dimension.
        dtype: of keys and values.
    """

    def __init__(
        self,
        forward: Forward,
        inputs: Mapping[str, Any],
        sites: Sequence[nn.Module],
        heads: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self._inputs = inputs
        self._sites = sites
        self._heads = heads
        self._dtype = dtype
        self._layers, self._out = self._run(forward)
        given = self._layers[0].keywords
        self.keywords = {
            "scale": given.get("scaling", heads[1] ** -0.5),
            "window": given.get("sliding_window"),
            "softcap": given.get("softcap"),
            "sinks": given.get("s_aux"),
        }

    def passes(self, forward: Forward) -> bool:
        """Whether another forward has the same output and leaves the same KV behind."""
        layers, out = self._run(forward)
        return close(out, self._out) and all(
            close(new.key_cache, old.key_cache) and close(new.value_cache, old.value_cache)
            for new, old in zip(layers, self._layers, strict=True)
        )

    def _run(self, forward: Forward) -> tuple[list[_Listener], Tensor]:
        kv_heads, dim = self._heads
        stage = Stage()
        stage.slots = torch.arange(TOKENS)
        ends = torch.tensor([0, TOKENS], dtype=torch.int32)
        stage.batch = PagedBatch(ends, ends[1:], stage.slots[None].to(torch.int32))
        shape, cpu = (TOKENS, kv_heads, 1), torch.device("cpu")
        layers = [_Listener(stage, shape, dim, dim, self._dtype, cpu) for _ in self._sites]
        for site, layer in zip(self._sites, layers, strict=True):
            attach(site, layer)
        try:
            out = forward(**self._inputs)
        finally:
            for site in self._sites:
                detach(site)
        return layers, out if isinstance(out, Tensor) else out[0]


def layer_inputs(width: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random input of an attention module or a decoder layer."""
    angles = torch.randn(1, TOKENS, dim) * 3
    return {
        "hidden_states": torch.randn(1, TOKENS, width).to(dtype),
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
        "attention_mask": None,
    }
