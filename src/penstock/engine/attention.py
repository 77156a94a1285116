"""Our attention function for Hugging Face models, and the KV cache of each layer.

transformers calls the function registered under :data:`NAME` once per layer, with the
queries, keys and values of all packed tokens.  Because no mask builder is registered under that
name, transformers builds no mask: causality and the borders between sequences are ours,
and come from the block tables of the step.

The function finds its layer's cache on the attention module itself.  Not every model passes
keywords on to its attention, and there is no state outside the model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from penstock.engine import kernels
from penstock.engine.kernels import PagedBatch
from penstock.engine.kernels.pages import advise

NAME = "penstock"
"""What ``config._attn_implementation`` is in a model of ours."""

_ATTRIBUTE = "penstock_layer"


class Layer(Protocol):
    """What stands behind one attention module."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **keywords: Any,
    ) -> Tensor:
        """Attention output ``[1, T, heads, v_dim]`` of ``[1, heads, T, dim]`` tensors."""
        ...


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    layer: Layer = getattr(module, _ATTRIBUTE)
    return layer.attend(module, query, key, value, attention_mask, **keywords), None


AttentionInterface.register(NAME, _attend)


def attach(module: nn.Module, layer: Layer) -> None:
    """Put a layer behind a module.

    Raises:
        RuntimeError: there is one, so two engines would write into each other's model.
    """
    if hasattr(module, _ATTRIBUTE):
        msg = "the model runs in another engine; close that one first"
        raise RuntimeError(msg)
    setattr(module, _ATTRIBUTE, layer)


def attached(module: nn.Module) -> PagedLayer:
    """The KV cache behind a module, for a forward pass of ours that needs no detour."""
    layer: PagedLayer = getattr(module, _ATTRIBUTE)
    return layer


def detach(module: nn.Module) -> None:
    """Take the module's layer away, if it has one."""
    if hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)


class Stage:
    """The step that is running: set before each forward pass, read by all layers of a model.

    Attributes:
        slots: int64 ``[T]``, ``block * block_size + offset`` of each packed token.
        batch: the step's sequences.
    """

    __slots__ = ("batch", "slots")

    slots: Tensor
    batch: PagedBatch


class PagedLayer:
    """One layer's KV cache.

    Args:
        stage: the step that is running, shared by all layers of a model.
        shape: ``(blocks, kv heads, block size)``.
        key_dim, value_dim: widths of a head's keys and values.
        dtype, device: of both caches.
    """

    def __init__(
        self,
        stage: Stage,
        shape: tuple[int, int, int],
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.stage = stage
        # Not zeroed: kernels read no token that has not been written, and large pages
        # that are never touched are never committed.
        self.key_cache, self.value_cache = (
            advise(torch.empty((*shape, dim), dtype=dtype, device=device))
            for dim in (key_dim, value_dim)
        )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Store the step's KV and attend over all of it; see :class:`Layer`.

        Keywords that are not named here have no bearing on the result: the probe has refused
        models in which one has.
        """
        del module, mask
        stage = self.stage
        kernels.store_kv(
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self.key_cache,
            self.value_cache,
            stage.slots,
        )
        attended = kernels.paged_attention(
            query[0].transpose(0, 1),
            self.key_cache,
            self.value_cache,
            stage.batch,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        return attended[None]
