"""KV of a request on its way between engines: what leaves one, and what another takes in.

The tensors are laid out by token, so engines with different block sizes understand each other.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from safetensors.torch import load, save
from torch import Tensor

from penstock.engine.attention import PagedLayer
from penstock.engine.kv import Blocks

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""Of the tensors of a KV: keys and values of the first layer, of the second, and so on."""


class HandoffError(ValueError):
    """KV that does not fit this model."""


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values, in host memory or on a device.

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
    def from_bytes(cls, data: builtins.bytes) -> LayerKV:
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

    def flat(self) -> tuple[Tensor, Shapes]:
        """As one tensor ``[elements]``, where they are if there is room, and their shapes."""
        parts = [part.flatten() for layer in self.layers for part in layer]
        shapes = tuple(tuple(part.shape) for layer in self.layers for part in layer)
        try:
            return torch.cat(parts), shapes
        except torch.OutOfMemoryError:
            return torch.cat([part.cpu() for part in parts]), shapes

    @classmethod
    def from_flat(cls, flat: Tensor, shapes: Shapes) -> LayerKV:
        """From what :meth:`flat` makes; views of it.

        Raises:
            HandoffError: the shapes are not those of this tensor.
        """
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) != flat.numel() or not sizes or len(sizes) % 2:
            msg = f"the KV of a hand-off has {flat.numel()} elements in shapes {shapes}"
            raise HandoffError(msg)
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return cls(tuple(zip(parts[::2], parts[1::2], strict=True)))

    @classmethod
    def sample(cls, device: str) -> LayerKV:
        """Of one token, all zeros; ``device`` is as :meth:`NativeEngine.load` takes it."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(((torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device)),))

    @classmethod
    def join(cls, parts: Sequence[LayerKV]) -> LayerKV:
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


def export(
    layers: Sequence[PagedLayer], blocks: Blocks, start: int, end: int, *, to_host: bool = True
) -> LayerKV:
    """Copy the KV of tokens ``start`` to ``end`` of a block table.

    Args:
        to_host: to host memory; else it stays on its device, if there is room for a copy.
    """
    if not to_host:
        try:
            return _export(layers, blocks, start, end, to_host=False)
        except torch.OutOfMemoryError:
            pass
    return _export(layers, blocks, start, end, to_host=True)


def _export(
    layers: Sequence[PagedLayer], blocks: Blocks, start: int, end: int, *, to_host: bool
) -> LayerKV:
    size = layers[0].key_cache.shape[2]
    first = start // size
    where = torch.from_numpy(blocks[first : -(-end // size)]).long()
    within = slice(start - first * size, end - first * size)
    found = []
    for layer in layers:
        key, value = (
            _by_token(cache.index_select(0, where.to(cache.device)), within, to_host=to_host)
            for cache in (layer.key_cache, layer.value_cache)
        )
        found.append((key, value))
    return LayerKV(tuple(found))


def check(layers: Sequence[PagedLayer], kv: LayerKV) -> None:
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
    layers: Sequence[PagedLayer], blocks: Blocks, start: int, end: int, kv: LayerKV
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


def _by_token(blocks: Tensor, within: slice, *, to_host: bool) -> Tensor:
    """A copy of ``[n, heads, size, dim]`` as ``[heads, tokens, dim]``."""
    count, heads, size, dim = blocks.shape
    whole = blocks.transpose(0, 1).reshape(heads, count * size, dim)
    if to_host:
        return whole[:, within].to("cpu", copy=True).contiguous()
    return whole[:, within].clone(memory_format=torch.contiguous_format)
