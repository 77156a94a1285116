"""Memory on large pages: what every step streams through, weights and KV.

With pages of 4 KiB the processor looks up a new address every 64 lines, and its prefetching stops
there.  Linux gives pages of 2 MiB to those who ask.  Asking is advice: where there are none, or
on another system, nothing changes but the speed.  Memory is then committed 2 MiB at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable
from functools import cache

from torch import Tensor

_CHUNK = 64 << 20
_LARGE = 2 << 20
_LINE = 64


def advise(tensor: Tensor) -> Tensor:
    """The same tensor; on a CPU its memory shall come in large pages once it is written to."""
    wanted: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
    if wanted is None or not tensor.is_cpu:
        return tensor
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    # Of whole large pages: what lies around them is somebody else's.
    first, last = -(-begin // _LARGE) * _LARGE, end // _LARGE * _LARGE
    if first < last:
        _madvise()(first, last - first, wanted)
    return tensor


class Piece:
    """Some memory of a chunk, and the rest of the chunk for the next one to ask.

    Attributes:
        tensor: the memory.
        rest: what lies behind it in the chunk.
    """

    __slots__ = ("__weakref__", "rest", "tensor")

    def __init__(self, tensor: Tensor, rest: Tensor) -> None:
        self.tensor = tensor
        self.rest = rest


class Chunks:
    """Lays small tensors side by side, so that they too are on large pages.

    A chunk lives as long as one of its pieces does.  What the last pieces of a chunk leave is
    used again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Of the latest chunk, as they lie.
        self._pieces: list[weakref.ref[Piece]] = []

    def take(self, like: Tensor, count: int) -> Piece:
        """Memory for so many elements, uninitialised, of the dtype of ``like``."""
        size = like.element_size()
        whole = -(-count * size // _LINE) * _LINE // size
        with self._lock:
            rest = self._rest()
            if rest is None or rest.dtype != like.dtype or rest.numel() < whole:
                rest = advise(like.new_empty(max(whole, _CHUNK // size)))
                self._pieces.clear()
            piece = Piece(rest[:count], rest[whole:])
            self._pieces.append(weakref.ref(piece))
        return piece

    def _rest(self) -> Tensor | None:
        """What lies behind the last piece that is left."""
        while self._pieces:
            last = self._pieces[-1]()
            if last is not None:
                return last.rest
            self._pieces.pop()
        return None


@cache
def _madvise() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found: Callable[[int, int, int], int] = call
    return found
