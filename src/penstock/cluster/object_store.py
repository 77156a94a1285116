"""KV by Ray's object store: shared memory on one machine, Ray's own transfers between machines."""

from __future__ import annotations

import asyncio

import ray
from ray.exceptions import RayError

from penstock.cluster.parcels import Inline, Parcel, ParcelLostError, Transport

_PATIENCE = 30.0


class ObjectStore:
    """See :class:`penstock.cluster.parcels.Transport`; a parcel is a reference.

    The sender owns what it put: if it dies before the receiver has it, it is lost.
    """

    def pack(self, data: bytes) -> Parcel:
        """Put the bytes there."""
        return ray.put(data)

    async def unpack(self, parcel: Parcel) -> bytes:
        """Get them."""
        try:
            data: bytes = await asyncio.wait_for(parcel, _PATIENCE)
        except (RayError, TimeoutError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise ParcelLostError(why[0]) from None
        return data

    async def fetch(self, parcel: Parcel) -> None:
        """Have Ray bring it to this machine's store, without a copy of it in this process."""
        await asyncio.to_thread(ray.wait, [parcel], timeout=_PATIENCE, fetch_local=True)


def transport(name: str) -> Transport:
    """By the names that ``--kv-transport`` takes."""
    return Inline() if name == "inline" else ObjectStore()
