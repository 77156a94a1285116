"""KV on its way between instances: how it is packed, and what carries it.

A parcel is opaque to the front: it takes it from the instance that made it and hands it to the one
that needs it.  With the object store it is a reference, and the bytes go from machine to machine
by themselves; inline it is the bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

from penstock.core.engine import KV
from penstock.server.factories import KVCodec

Parcel: TypeAlias = Any
"""KV packed by a :class:`Transport`; goes through Ray's calls as it is."""


class ParcelLostError(RuntimeError):
    """KV that does not arrive: its sender died, or the network did not bring it in time."""


class Transport(Protocol):
    """Carries bytes from one instance to another."""

    def pack(self, data: bytes) -> Parcel:
        """At the sender."""
        ...

    async def unpack(self, parcel: Parcel) -> bytes:
        """At the receiver.

        Raises:
            ParcelLostError: the bytes do not arrive.
        """
        ...


class Inline:
    """In the messages themselves, by way of the front: for KV that is small, and for tests."""

    def pack(self, data: bytes) -> Parcel:
        """As it is."""
        return data

    async def unpack(self, parcel: Parcel) -> bytes:
        """As it is."""
        data: bytes = parcel
        return data


class Packed(NamedTuple):
    """A parcel, and what it weighs in bytes."""

    parcel: Parcel
    size: int


class Desk:
    """Where an instance's engine leaves KV for others, and finds what came for it.

    Args:
        codec: of the engine's kind of KV.
        transport: what carries it.
    """

    def __init__(self, codec: KVCodec, transport: Transport) -> None:
        self._codec = codec
        self._transport = transport
        self._outgoing: dict[str, Packed] = {}
        self._incoming: dict[str, KV] = {}

    # -- the engine's thread ---------------------------------------------------------------

    def leave(self, slice_id: str, kv: KV) -> None:
        """Pack what a request that has just ended leaves behind."""
        data = self._codec.encode(kv)
        self._outgoing[slice_id] = Packed(self._transport.pack(data), len(data))

    def find(self, slice_id: str) -> KV | None:
        """What came for a request, once."""
        return self._incoming.pop(slice_id, None)

    # -- the event loop --------------------------------------------------------------------

    def collect(self) -> dict[str, Packed]:
        """All that is to be taken away."""
        packed, self._outgoing = self._outgoing, {}
        return packed

    async def deliver(self, slice_id: str, parcel: Parcel) -> int:
        """Unpack what came for a request; its bytes.

        Raises:
            ParcelLostError: it does not arrive.
        """
        data = await self._transport.unpack(parcel)
        self._incoming[slice_id] = self._codec.decode(data)
        return len(data)
