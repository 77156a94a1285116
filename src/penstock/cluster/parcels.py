"""KV on its way between instances: how it is packed, and what carries it.

A parcel is opaque to the front: it takes it from the instance that made it and hands it to the one
that needs it.  With the object store it is a reference, and the bytes go from machine to machine
by themselves; inline it is the bytes; with a direct transport it is a reference to a tensor that
stays where it is until the receiver takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from penstock.core.engine import KV
from penstock.server.factories import KVCodec

Parcel: TypeAlias = Any
"""KV packed by a :class:`Transport`; goes through Ray's calls as it is."""


PATIENCE = 30.0
"""Seconds after which KV that has not come is given up."""


class ParcelLostError(RuntimeError):
    """KV that does not arrive: its sender died, or the network did not bring it in time."""


def first_line(error: BaseException) -> str:
    """What it says, or else what it is."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Weighed(NamedTuple):
    """Something, and the bytes that it is on the way."""

    what: Any
    size: int


class Transport(Protocol):
    """Carries KV from one instance to another."""

    def pack(self, kv: KV) -> Weighed:
        """At the sender: a parcel."""
        ...

    async def unpack(self, parcel: Parcel) -> Weighed:
        """At the receiver: KV.

        Raises:
            ParcelLostError: it does not arrive.
            ValueError: it is no KV.
        """
        ...

    async def fetch(self, parcel: Parcel) -> None:
        """Have it at the receiver, packed; if it does not come, :meth:`unpack` will say."""
        ...


class Inline:
    """In the messages themselves, by way of the front: for KV that is small, and for tests.

    Args:
        codec: of the engine's kind of KV.
    """

    def __init__(self, codec: KVCodec) -> None:
        self._codec = codec

    def pack(self, kv: KV) -> Weighed:
        """As bytes."""
        data = self._codec.encode(kv)
        return Weighed(data, len(data))

    async def unpack(self, parcel: Parcel) -> Weighed:
        """From bytes."""
        return Weighed(self._codec.decode(parcel), len(parcel))

    async def fetch(self, parcel: Parcel) -> None:
        """It is there."""


class Packed(NamedTuple):
    """A parcel, what it weighs in bytes, and whether none follows it.

    All but the last were packed while the prefill went on.
    """

    parcel: Parcel
    size: int
    last: bool


class Desk:
    """Where an instance's engine leaves KV for others, and finds what came for it.

    Args:
        transport: what carries it.
        join: makes one of parts in order.
    """

    def __init__(self, transport: Transport, join: Callable[[Sequence[Any]], KV]) -> None:
        self._transport = transport
        self._join = join
        # What was collected is pickled at once: nothing may be added to it any more.
        self._leaving = threading.Lock()
        self._outgoing: dict[str, list[Packed]] = {}
        self._incoming: dict[str, KV] = {}

    # -- the engine's thread ---------------------------------------------------------------

    def leave(self, slice_id: str, kv: KV, *, last: bool) -> None:
        """Pack KV of a request: what followed the part before, the ``last`` as it ended."""
        packed = Packed(*self._transport.pack(kv), last)
        with self._leaving:
            self._outgoing.setdefault(slice_id, []).append(packed)

    def find(self, slice_id: str) -> KV | None:
        """What came for a request, once."""
        return self._incoming.pop(slice_id, None)

    # -- the event loop --------------------------------------------------------------------

    def collect(self) -> dict[str, list[Packed]]:
        """All that is to be taken away, in order."""
        with self._leaving:
            packed, self._outgoing = self._outgoing, {}
        return packed

    async def deliver(self, slice_id: str, parcels: Sequence[Parcel]) -> int:
        """Unpack the parts that came for a request; their bytes.

        Raises:
            ParcelLostError: one does not arrive.
            ValueError: they are no KV, or do not fit together.
        """
        parts = [await self._transport.unpack(parcel) for parcel in parcels]
        self._incoming[slice_id] = self._join([part.what for part in parts])
        return sum(part.size for part in parts)

    async def fetch(self, parcel: Parcel) -> None:
        """Have a part here before it is needed; if it does not come, :meth:`deliver` will say."""
        await self._transport.fetch(parcel)
