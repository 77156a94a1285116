"""What the front keeps of each request, and whom it works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import msgspec

from penstock.cluster.parcels import Parcel
from penstock.core.dispatcher import SliceId
from penstock.server.messages import Add, Command, Gauges

_GREEDY_BELOW = 1e-5


class Instances(Protocol):
    """Carries commands to instances and keeps these alive."""

    def send(self, number: int, command: Command, parcels: Sequence[Parcel] = ()) -> None:
        """Hand a command to an instance that has said that it is ready and is not lost.

        ``parcels``: KV that a request brings, in parts.
        """
        ...

    def send_ahead(self, number: int, parcel: Parcel) -> None:
        """Have such an instance fetch a part of KV whose request will follow with all parts."""
        ...

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            EngineStartError: an instance could not start, and none had before.
        """
        ...


class InstanceObserver(Protocol):
    """Who counts per instance: :class:`penstock.server.metrics.Metrics`."""

    def on_instance(self, number: int, gauges: Gauges, load: float) -> None:
        """An instance's books; ``load`` is the estimated seconds of what it was sent."""
        ...

    def on_instance_lost(self, number: int, *, left: int) -> None:
        """It ended by itself; so many are left."""
        ...

    def on_hand_off(self, size: int, seconds: float) -> None:
        """KV went from one instance to another: bytes, and time from the end of the prefill."""
        ...


@dataclass(slots=True, eq=False)
class Story:
    """A request as a whole.

    Attributes:
        add: as it came.
        tokens: what it has said.
        number, slice_id: the instance that it is at, and its stay there; empty in the pool.
        had: tokens when that began.
        losses: stays in a row that ended with the instance, without a token; prefills that went
            well do not count.
        parcels: KV in hand, in parts.
        left_at: when that was, by the front's clock.
    """

    add: Add
    tokens: list[int] = field(default_factory=list)
    number: int = 0
    slice_id: SliceId = ""
    had: int = 0
    evictions: int = 0
    losses: int = 0
    parcels: Sequence[Parcel] = ()
    left_at: float = 0.0


def seeded(add: Add) -> Add:
    """With a seed of its own, so that its random stream does not depend on the slice's name."""
    sampling = add.sampling
    if sampling.seed is not None or sampling.temperature < _GREEDY_BELOW:
        return add
    digest = blake2b(add.id.encode(), digest_size=8, person=b"front").digest()
    seed = int.from_bytes(digest, "little") >> 1  # seeds have 63 bits
    return msgspec.structs.replace(add, sampling=msgspec.structs.replace(sampling, seed=seed))
