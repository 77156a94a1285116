"""KV from device to device: Ray's direct transport, which moves tensors by NIXL.

The sender's copy stays where it is, on a GPU or in host memory, and is registered for remote reads.
The receiver reads it into memory of the same kind: over NVLink, InfiniBand or RoCE where there are
such, else through shared memory or TCP.  Nothing is serialized, and Ray's object store and the
front see a reference only.  A copy is given back once nobody refers to it any more.

What this transport will not take goes by the messages, as bytes.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import ray
from ray.exceptions import RayError

from penstock.cluster.parcels import (
    PATIENCE,
    Inline,
    Parcel,
    ParcelLostError,
    Weighed,
    first_line,
)
from penstock.core.engine import KV
from penstock.server.factories import KVCodec, TensorCodec

_Ref: TypeAlias = "ray.ObjectRef[Any]"
_NIXL = "nixl"


class _Tensor(NamedTuple):
    """A parcel: a tensor that holds all parts of a KV, and what tells them apart."""

    flat: _Ref
    parts: Any


class _Pull(NamedTuple):
    """A read that was begun ahead, and what forgets it if nobody comes for it."""

    tensor: asyncio.Future[Any]
    forgets: asyncio.TimerHandle


class Direct:
    """See :class:`penstock.cluster.parcels.Transport`; only for engines whose KV is tensors.

    Args:
        codec: of the engine's kind of KV.
        device: as the engine is told; the transport is tried out on it.

    Raises:
        Exception: the transport does not work here, in its own words.
    """

    def __init__(self, codec: KVCodec, device: str) -> None:
        assert codec.tensors is not None, "refused at start for engines without tensors"
        self._tensors: TensorCodec = codec.tensors
        self._inline = Inline(codec)
        # Two reads at a time can break each other: what NIXL knows of a sender is made anew
        # whenever the sender has freed something.
        self._lane = ThreadPoolExecutor(1, "kv-pull")
        self._ahead: dict[_Ref, _Pull] = {}
        # Read as NIXL is imported, which greets everyone on standard output: the server's own.
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        # What does not work is to show now, and finding out what connects this machine takes
        # seconds.
        self._offer(self._tensors.sample(device))

    def pack(self, kv: KV) -> Weighed:
        """Offer it."""
        try:
            return Weighed(self._offer(kv), kv.bytes)
        except Exception:  # noqa: BLE001 - neither library says what it may raise
            traceback.print_exc()
            return self._inline.pack(kv)

    async def unpack(self, parcel: Parcel) -> Weighed:
        """Read it."""
        if isinstance(parcel, bytes):
            return await self._inline.unpack(parcel)
        flat, parts = parcel
        pull = self._ahead.pop(flat, None)
        try:
            tensor = await (self._begin(flat) if pull is None else self._second_try(flat, pull))
        except (RayError, RuntimeError) as error:  # no memory on the device is a RuntimeError
            raise ParcelLostError(first_line(error)) from None
        kv = self._tensors.from_flat(tensor, parts)
        return Weighed(kv, kv.bytes)

    async def fetch(self, parcel: Parcel) -> None:
        """Begin to read it; if nobody asks for it in time, it is forgotten."""
        if isinstance(parcel, bytes):
            return
        flat = parcel[0]
        loop = asyncio.get_running_loop()
        tensor = self._begin(flat)
        # Whoever unpacks it hears of its failure; perhaps nobody does.
        tensor.add_done_callback(lambda done: done.cancelled() or done.exception())
        forgets = loop.call_later(PATIENCE, self._ahead.pop, flat, None)
        self._ahead[flat] = _Pull(tensor, forgets)

    async def _second_try(self, flat: _Ref, pull: _Pull) -> Any:
        """What was read ahead, or else what is read now."""
        pull.forgets.cancel()
        try:
            return await pull.tensor
        except (RayError, RuntimeError):
            return await self._begin(flat)

    def _offer(self, kv: KV) -> _Tensor:
        flat, parts = self._tensors.flat(kv)
        return _Tensor(ray.put(flat, _tensor_transport=_NIXL), parts)

    def _begin(self, flat: _Ref) -> asyncio.Future[Any]:
        # Ray cannot await what comes by a direct transport.  Others may be read first.
        deadline = time.monotonic() + PATIENCE
        return asyncio.get_running_loop().run_in_executor(self._lane, _read, flat, deadline)


def _read(flat: _Ref, deadline: float) -> Any:
    return ray.get(flat, timeout=max(0.1, deadline - time.monotonic()))
