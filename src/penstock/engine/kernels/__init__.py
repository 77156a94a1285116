"""Paged attention and weight layouts for the native engine.

Two implementations stand behind each function: a compiled one for CPUs (:mod:`.native`) and
plain PyTorch (:mod:`.portable`), which works everywhere.  The compiled one is built at first
use; where that fails, one line is logged and PyTorch does the work.  The environment variable
``PENSTOCK_KERNELS`` forces one of them: ``native`` or ``torch``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from penstock.engine.kernels import portable
from penstock.engine.kernels.batch import PagedBatch
from penstock.engine.kernels.choice import compiled
from penstock.engine.kernels.linear import has_bfloat16, prepack

__all__ = [
    "PagedBatch",
    "backend",
    "compiled",
    "has_bfloat16",
    "paged_attention",
    "prepack",
    "store_kv",
]


def backend() -> Literal["native", "torch"]:
    """Which implementation serves CPU tensors; raises what :func:`compiled` raises."""
    return "torch" if compiled() is None else "native"


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Write a step's keys and values into the cache.

    Args:
        key: ``[T, kv_heads, dim]``; any strides.
        value: ``[T, kv_heads, v_dim]``; any strides.
        key_cache: ``[num_blocks, kv_heads, block_size, dim]``, contiguous.
        value_cache: ``[num_blocks, kv_heads, block_size, v_dim]``, contiguous.
        slots: int64 ``[T]``, ``block * block_size + offset`` of each token.
    """
    kernels = compiled() if key.is_cpu else None
    if kernels is not None and kernels.takes(key, value, key_cache, value_cache):
        kernels.store_kv(key, value, key_cache, value_cache, slots)
    else:
        portable.store_kv(key, value, key_cache, value_cache, slots)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of a step's query tokens over their sequences' cached KV.

    The step's own keys and values must have been stored before.

    Args:
        query: ``[T, heads, dim]``; any strides; ``heads`` is a multiple of ``kv_heads``.
        key_cache: ``[num_blocks, kv_heads, block_size, dim]``, contiguous.
        value_cache: ``[num_blocks, kv_heads, block_size, v_dim]``, contiguous.
        batch: which tokens belong to which sequence, and where its KV is.
        scale: factor on the dot products.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all.
        softcap: bound the scaled scores by ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: ``[heads]``, per head one more logit in the softmax that has no value (gpt-oss).

    Returns:
        ``[T, heads, v_dim]``, contiguous, of the query's dtype.
    """
    kernels = compiled() if query.is_cpu else None
    if kernels is not None and kernels.takes(query, key_cache, value_cache):
        attend = kernels.paged_attention
    else:
        attend = portable.paged_attention
    return attend(
        query, key_cache, value_cache, batch,
        scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip
