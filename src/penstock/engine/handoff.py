"""KV of a request on its way between engines: what leaves one, and what another takes in.

The tensors are laid out by token, so engines with different block sizes understand each other.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from penstock.engine.attention import PagedLayer
from penstock.engine.kv import Blocks


class HandoffError(ValueError):
    """KV that does not fit this model."""


@dataclass(frozen=True, slots=True)
class HostKV:
    """Keys and values in host memory.

    Attributes:
        layers: of each attention layer, keys ``[kv heads, tokens, dim]`` and values likewise.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def tokens(self) -> int:
        """How many have KV."""
        return int(self.layers[0][0].shape[1])

    @property
    def bytes(self) -> int:
        """What it weighs."""
        return sum(part.nbytes for layer in self.layers for part in layer)

    def to_bytes(self) -> builtins.bytes:
        """As safetensors."""
        named = {}
        for index, (key, value) in enumerate(self.layers):
            named[f"{index}.key"], named[f"{index}.value"] = key, value
        return save(named)

    @classmethod
    def from_bytes(cls, data: builtins.bytes) -> HostKV:
        """From safetensors.

        Raises:
            HandoffError: they are not what :meth:`to_bytes` makes.
        """
        try:
            named = load(data)
            count = len(named) // 2
            layers = tuple((named[f"{i}.key"], named[f"{i}.value"]) for i in range(count))
        except Exception as error:  # safetensors has no error of its own for each case
            msg = f"the KV of a hand-off cannot be read: {error}"
            raise HandoffError(msg) from error
        if not layers or len(named) % 2:
            msg = f"the KV of a hand-off has {len(named)} tensors; it must have two per layer"
            raise HandoffError(msg)
        return cls(layers)

    @classmethod
    def join(cls, parts: Sequence[HostKV]) -> HostKV:
        """Parts that follow each other, as one.

        Raises:
            HandoffError: they are not of one model.
        """
        if len(parts) == 1:
            return parts[0]
        try:
            layers = [
                tuple(torch.cat(same, dim=1) for same in zip(*layer, strict=True))
                for layer in zip(*(part.layers for part in parts), strict=True)
            ]
        except (RuntimeError, ValueError) as error:
            msg = f"the parts of a hand-off's KV do not fit together: {error}"
            raise HandoffError(msg) from error
        return cls(tuple((key, value) for key, value in layers))


def export(layers: Sequence[PagedLayer], blocks: Blocks, start: int, end: int) -> HostKV:
    """Copy the KV of tokens ``start`` to ``end`` of a block table to host memory."""
    size = layers[0].key_cache.shape[2]
    first = start // size
    where = torch.from_numpy(blocks[first : -(-end // size)]).long()
    within = slice(start - first * size, end - first * size)
    found = []
    for layer in layers:
        key, value = (
            _by_token(cache.index_select(0, where.to(cache.device)), within)
            for cache in (layer.key_cache, layer.value_cache)
        )
        found.append((key, value))
    return HostKV(tuple(found))


def check(layers: Sequence[PagedLayer], kv: HostKV) -> None:
    """Raise HandoffError unless this KV fits these layers."""
    if len(kv.layers) != len(layers):
        msg = f"the KV of a hand-off has {len(kv.layers)} layers; this model has {len(layers)}"
        raise HandoffError(msg)
    for index, (layer, parts) in enumerate(zip(layers, kv.layers, strict=True)):
        for cache, part in zip((layer.key_cache, layer.value_cache), parts, strict=True):
            right = (cache.shape[1], kv.tokens, cache.shape[3])
            if tuple(part.shape) != right or part.dtype != cache.dtype:
                msg = (
                    f"layer {index} of a hand-off's KV is {part.dtype} {tuple(part.shape)}; "
                    f"this model needs {cache.dtype} {right}: both instances must run one model"
                )
                raise HandoffError(msg)


def bring_in(
    layers: Sequence[PagedLayer], blocks: Blocks, start: int, end: int, kv: HostKV
) -> None:
    """Write tokens ``start`` to ``end`` of checked KV into a block table."""
    size = layers[0].key_cache.shape[2]
    positions = torch.arange(start, end)
    block = torch.from_numpy(blocks).long()[positions // size]
    offset = positions % size
    for layer, parts in zip(layers, kv.layers, strict=True):
        for cache, part in zip((layer.key_cache, layer.value_cache), parts, strict=True):
            rows = part[:, start:end].transpose(0, 1).to(cache.device)
            cache[block.to(cache.device), :, offset.to(cache.device)] = rows


def _by_token(blocks: Tensor, within: slice) -> Tensor:
    """``[n, heads, size, dim]`` as ``[heads, tokens, dim]`` on the host."""
    count, heads, size, dim = blocks.shape
    whole = blocks.transpose(0, 1).reshape(heads, count * size, dim)
    return whole[:, within].to("cpu", copy=True).contiguous()
