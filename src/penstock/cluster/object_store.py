"""KV by Ray's object store: shared memory on one machine, Ray's own transfers between machines."""

from __future__ import annotations

import asyncio

import ray
from ray.exceptions import RayError

from penstock.cluster.parcels import PATIENCE, Inline, Parcel, ParcelLostError, Weighed, first_line
from penstock.core.engine import KV
from penstock.server.factories import KVCodec


class ObjectStore:
    """See :class:`penstock.cluster.parcels.Transport`; a parcel is a reference.

    The sender owns what it put: if it dies before the receiver has it, it is lost.

    Args:
        codec: of the engine's kind of KV.
    """

    def __init__(self, codec: KVCodec) -> None:
        self._inline = Inline(codec)

    def pack(self, kv: KV) -> Weighed:
        """Put it there, as bytes."""
        data, size = self._inline.pack(kv)
        return Weighed(ray.put(data), size)

    async def unpack(self, parcel: Parcel) -> Weighed:
        """Get it."""
        try:
            data: bytes = await asyncio.wait_for(parcel, PATIENCE)
        except (RayError, TimeoutError) as error:
            raise ParcelLostError(first_line(error)) from None
        return await self._inline.unpack(data)

    async def fetch(self, parcel: Parcel) -> None:
        """Have Ray bring it to this machine's store, without a copy of it in this process."""
        await asyncio.to_thread(ray.wait, [parcel], timeout=PATIENCE, fetch_local=True)
