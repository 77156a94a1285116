"""KV from device to device: Ray's direct transport, which moves tensors by NIXL.

The sender's copy stays where it is, on a GPU or in host memory, and is registered for remote reads.
The receiver reads it into memory of the same kind: over NVLink, InfiniBand or RoCE where there are
such, else through shared memory or TCP.  Nothing is serialized, and Ray's object store and the
front see a reference only.  A copy is given back once nobody refers to it any more.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, NamedTuple, TypeAlias

import ray
from ray.exceptions import RayError

from penstock.cluster.parcels import PATIENCE, Parcel, ParcelLostError, Weighed, first_line
from penstock.core.engine import KV
from penstock.server.factories import TensorCodec

_Ref: TypeAlias = "ray.ObjectRef[Any]"


class _Tensor(NamedTuple):
    """A parcel: a tensor that holds all parts of a KV, and what tells them apart."""

    flat: _Ref
    parts: Any


class Direct:
    """See :class:`penstock.cluster.parcels.Transport`; only for engines whose KV is tensors.

    Args:
        codec: of the engine's kind of KV.
    """

    def __init__(self, codec: TensorCodec) -> None:
        self._codec = codec
        self._pulls: dict[_Ref, asyncio.Task[Any]] = {}
        # Read as NIXL is imported, which greets everyone on standard output: the server's own.
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        # Finding out what connects this machine takes seconds: now, not at the first request.
        self.pack(codec.sample())

    def pack(self, kv: KV) -> Weighed:
        """Offer it."""
        flat, parts = self._codec.flat(kv)
        return Weighed(_Tensor(ray.put(flat, _tensor_transport="nixl"), parts), kv.bytes)

    async def unpack(self, parcel: Parcel) -> Weighed:
        """Read it."""
        flat, parts = parcel
        pull = self._pulls.pop(flat, None) or self._pull(flat)
        try:
            tensor = await pull
        except RayError as error:
            raise ParcelLostError(first_line(error)) from None
        kv = self._codec.from_flat(tensor, parts)
        return Weighed(kv, kv.bytes)

    async def fetch(self, parcel: Parcel) -> None:
        """Read it ahead; if nobody asks for it in time, it is forgotten."""
        flat = parcel[0]
        pull = self._pulls[flat] = self._pull(flat)
        await asyncio.wait((pull,))
        await asyncio.sleep(PATIENCE)
        if self._pulls.get(flat) is pull:
            del self._pulls[flat]

    @staticmethod
    def _pull(flat: _Ref) -> asyncio.Task[Any]:
        # Ray cannot await what comes by a direct transport.
        task = asyncio.create_task(asyncio.to_thread(ray.get, flat, timeout=PATIENCE))
        # Whoever unpacks it hears of its failure; perhaps nobody does.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task
