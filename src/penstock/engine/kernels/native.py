"""The compiled kernels behind the same signatures as :mod:`penstock.engine.kernels.portable`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.kernels import structures
from penstock.engine.kernels.batch import PagedBatch
from penstock.engine.kernels.pages import Chunks, Piece

_DTYPES = (torch.float32, torch.bfloat16)
_PANEL = 32  # outputs that matrix.cpp keeps together


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear layer for :meth:`Native.linear`: the C structure, and what it points to."""

    pointers: structures.Linear
    weight: Piece
    bias: Tensor | None


class Native:
    """The loaded library.

    Raises:
        OSError: the file cannot be loaded, or is not this version's.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        sized = {
            "attention": structures.Attention,
            "rotary": structures.Rotary,
            "layer": structures.Layer,
            "step": structures.Step,
        }
        for name, structure in sized.items():
            size_of = _bind(library, f"{name}_size", ctypes.c_int64)
            if size_of() != ctypes.sizeof(structure):
                msg = f"{path} is not the kernel library of this version"
                raise OSError(msg)
        bind = functools.partial(_bind, library)
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._attention = bind("attention", number, pointer)
        self._store = bind("store", None, *[pointer] * 3, *[size] * 6)
        self._rotary = bind("rotary", None, pointer)
        norm = (*[pointer] * 3, *[size] * 2, ctypes.c_float, *[number] * 2)
        self._rms_norm = bind("rms_norm", None, *norm)
        self._gated_silu = bind("gated_silu", None, *[pointer] * 2, *[size] * 2, *[number] * 2)
        self._pack = bind("pack", None, *[pointer] * 2, *[size] * 2)
        self._linear = bind("linear", number, *[pointer] * 4, size, number)
        self._layer = bind("layer", number, *[pointer] * 3)
        self._layer_scratch = bind("layer_scratch", size, pointer)
        self._weights = Chunks()
        self._has_linear = bool(bind("has_linear", number)())

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether these tensors are of the one dtype and on the device the library handles."""
        dtype = tensors[0].dtype
        return dtype in _DTYPES and all(t.is_cpu and t.dtype == dtype for t in tensors)

    def store_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """Write a step's keys and values; see :func:`penstock.engine.kernels.store_kv`."""
        slots = slots.contiguous()
        for source, cache in ((key, key_cache), (value, value_cache)):
            new = source if source.stride(-1) == 1 else source.contiguous()
            size = new.element_size()
            token_stride, head_stride, _ = new.stride()
            self._store(
                new.data_ptr(),
                cache.data_ptr(),
                slots.data_ptr(),
                new.shape[0],
                new.shape[1],
                cache.shape[2],
                new.shape[2] * size,
                token_stride * size,
                head_stride * size,
            )

    def paged_attention(
        self,
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
        if query.stride(-1) != 1:
            query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])
        if sinks is not None:
            sinks = sinks.float().contiguous()
        call = structures.Attention(
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context.data_ptr(),
            batch.block_table.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            batch.context.shape[0],
            query.shape[1],
            key_cache.shape[1],
            query.shape[2],
            value_cache.shape[3],
            key_cache.shape[2],
            batch.block_table.stride(0),
            query.stride(0),
            query.stride(1),
            window or 0,
            scale,
            softcap or 0.0,
            torch.get_num_threads(),
            int(query.dtype is torch.bfloat16),
        )
        if self._attention(ctypes.byref(call)):
            msg = "the attention kernel ran out of memory"
            raise MemoryError(msg)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * weight`` over the last axis."""
        _require_one_dtype(x, weight)
        x = x.contiguous()
        out = torch.empty_like(x)
        width = weight.shape[0]
        self._rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            eps,
            torch.get_num_threads(),
            x.dtype is torch.bfloat16,
        )
        return out

    def gated_silu(self, x: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``[..., 2 * width]``, the gates first: ``[..., width]``."""
        _require_one_dtype(x)
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        self._gated_silu(
            x.data_ptr(),
            out.data_ptr(),
            x.numel() // (2 * width),
            width,
            torch.get_num_threads(),
            x.dtype is torch.bfloat16,
        )
        return out

    def rotate_and_store(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        slots: Tensor,
        norms: tuple[Tensor, Tensor, float] | None = None,
    ) -> Tensor:
        """Rotary embedding of queries and keys, and the KV store, in one pass.

        Args:
            qkv: ``[T, (heads + 2 * kv_heads) * dim]``, contiguous: the heads' queries, then
                keys, then values.  Queries are rotated in place; keys may change too.
            angles: cosines and sines, contiguous ``[T, dim]``, as Hugging Face makes them.
            caches: keys and values, as in :func:`penstock.engine.kernels.store_kv`.
            slots: int64 ``[T]``.
            norms: weights ``[dim]`` of an RMSNorm of each query and key head before the
                rotation, and its epsilon.

        Returns:
            The queries, ``[T, heads, dim]``, a view into ``qkv``.
        """
        _require_one_dtype(qkv, *angles, *caches, *(norms or ())[:2])
        key_cache, value_cache = caches
        kv_heads, dim = key_cache.shape[1], key_cache.shape[3]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        call = structures.Rotary(
            qkv.data_ptr(),
            angles[0].data_ptr(),
            angles[1].data_ptr(),
            0 if norms is None else norms[0].data_ptr(),
            0 if norms is None else norms[1].data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slots.data_ptr(),
            qkv.shape[0],
            heads,
            kv_heads,
            dim,
            key_cache.shape[2],
            qkv.stride(0),
            0.0 if norms is None else norms[2],
            torch.get_num_threads(),
            qkv.dtype is torch.bfloat16,
        )
        self._rotary(ctypes.byref(call))
        return qkv[:, : heads * dim].view(-1, heads, dim)

    def packs(self, weight: Tensor) -> bool:
        """Whether :meth:`pack_linear` takes this weight on this CPU."""
        return self._has_linear and weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedWeight:
        """Copy a linear layer's ``[outputs, inputs]`` weight into the kernel's layout."""
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        piece = self._weights.take(weight, -(-outputs // _PANEL) * _PANEL * inputs)
        packed = piece.tensor.data_ptr()
        self._pack(weight.data_ptr(), packed, outputs, inputs)
        bias = None if bias is None else bias.contiguous()
        added = 0 if bias is None else bias.data_ptr()
        return PackedWeight(structures.Linear(packed, added, outputs, inputs), piece, bias)

    def linear(self, layer: PackedWeight, x: Tensor, out: Tensor) -> Tensor:
        """Write ``x @ weight.T + bias`` to ``out``; both contiguous bfloat16."""
        x = x.contiguous()
        if x.dtype is not torch.bfloat16:
            msg = f"a bfloat16 linear layer was given {x.dtype}"
            raise TypeError(msg)
        rows = x.numel() // layer.pointers.inputs
        failed = self._linear(
            ctypes.byref(layer.pointers),
            x.data_ptr(),
            0,
            out.data_ptr(),
            rows,
            torch.get_num_threads(),
        )
        if failed:
            msg = f"no memory for a linear layer of {rows} rows"
            raise MemoryError(msg)
        return out

    def layer_scratch(self, layer: structures.Layer) -> int:
        """Elements of scratch memory that :meth:`layer` needs per token."""
        return int(self._layer_scratch(ctypes.byref(layer)))

    def layer(self, layer: structures.Layer, step: structures.Step, hidden: Tensor) -> None:
        """Run a decoder layer on ``[T, hidden size]``, contiguous bfloat16, in place."""
        if hidden.dtype is not torch.bfloat16:
            msg = f"a bfloat16 decoder layer was given {hidden.dtype}"
            raise TypeError(msg)
        if self._layer(ctypes.byref(layer), ctypes.byref(step), hidden.data_ptr()):
            msg = "the attention kernel ran out of memory"
            raise MemoryError(msg)


def _require_one_dtype(*tensors: Tensor) -> None:
    """Refuse what the library would read, and write, beyond the end of."""
    if not Native.takes(*tensors):
        found = ", ".join(sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors}))
        msg = f"the kernels were given {found}; they take all float32 or all bfloat16 on cpu"
        raise TypeError(msg)


def _bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(library, f"penstock_{name}")
    function.restype = result
    function.argtypes = arguments
    bound: Callable[..., Any] = function
    return bound
