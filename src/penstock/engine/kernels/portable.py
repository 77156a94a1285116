"""Paged attention in plain PyTorch: any device, any dtype, no compiler.

Sequences with one query token (decoding) are attended together, their KV gathered and
padded to the longest; the others (prefill, recompute) one by one, so that nothing is padded
where the work is quadratic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.engine.kernels.batch import PagedBatch


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Write a step's keys and values; see :func:`penstock.engine.kernels.store_kv`."""
    block_size = key_cache.shape[2]
    block = torch.div(slots, block_size, rounding_mode="floor")
    offset = slots - block * block_size
    # Advanced indices around a slice put the token axis first: [T, kv_heads, dim].
    key_cache[block, :, offset] = key.to(key_cache.dtype)
    value_cache[block, :, offset] = value.to(value_cache.dtype)


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
    """Attend over a paged cache; see :func:`penstock.engine.kernels.paged_attention`."""
    out = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])
    starts = batch.query_start.tolist()
    contexts = batch.context.tolist()
    single = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] == 1]
    groups = [single] if single else []
    groups += [[s] for s in range(len(contexts)) if starts[s + 1] - starts[s] > 1]
    for group in groups:
        rows = slice(starts[group[0]], starts[group[-1] + 1])
        if len(group) > 1 and rows.stop - rows.start != len(group):
            index: slice | Tensor = torch.tensor([starts[s] for s in group], device=query.device)
        else:
            index = rows
        longest = max(contexts[s] for s in group)
        members = torch.tensor(group, device=query.device)
        key = _gather(key_cache, batch.block_table, members, longest)
        value = _gather(value_cache, batch.block_table, members, longest)
        queries = query[index].unflatten(0, (len(group), -1)).transpose(1, 2)
        mask = _mask(batch.context[members], queries.shape[2], longest, window)
        attended = _attend(queries, key, value, mask, scale, softcap, sinks)
        out[index] = attended.transpose(1, 2).flatten(0, 1)
    return out


def _gather(cache: Tensor, block_table: Tensor, members: Tensor, longest: int) -> Tensor:
    """KV of some sequences, padded to ``longest``: ``[n, kv_heads, longest, dim]``."""
    blocks = -(-longest // cache.shape[2])
    # Table entries past a sequence's context may hold anything; their tokens are masked.
    table = block_table[members, :blocks].long().clamp_(0, cache.shape[0] - 1)
    pages = cache[table].transpose(1, 2).flatten(2, 3)
    return pages[:, :, :longest]


def _mask(context: Tensor, query_tokens: int, longest: int, window: int | None) -> Tensor:
    """Which KV token each query token sees: bool ``[n, 1, query_tokens, longest]``."""
    device = context.device
    positions = context[:, None] - query_tokens + torch.arange(query_tokens, device=device)
    distance = positions[:, :, None] - torch.arange(longest, device=device)
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    return mask[:, None]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of ``[n, heads, q, dim]`` over ``[n, kv_heads, k, dim]``."""
    # Masked weights are zero, but zero times a NaN from a block nobody has written is NaN.
    seen = mask.any(dim=2).transpose(1, 2).unsqueeze(1)
    value = value.to(query.dtype).masked_fill(~seen, 0)
    key = key.to(query.dtype).masked_fill(~seen, 0)
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    n, heads, tokens, _ = query.shape
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    logits = torch.einsum("nhgqd,nhkd->nhgqk", grouped, key.float()).flatten(1, 2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(1, heads, 1, 1).expand(n, heads, tokens, 1)
        weights = torch.cat([logits, extra], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    weights = weights.unflatten(1, (key.shape[1], -1))
    return torch.einsum("nhgqk,nhkd->nhgqd", weights, value.float()).flatten(1, 2).to(query.dtype)
