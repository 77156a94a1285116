"""Policies for several instances: what they look at, what they look like, and their composition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from penstock.core.forecast.slices import SliceCost
from penstock.core.policies.back_pressure import BackPressure
from penstock.core.policies.move.by_gain import ByGain
from penstock.core.types import Role


class InstanceView(NamedTuple):
    """An instance as the dispatcher knows it.

    Attributes:
        number: its name.
        requests: sent there and not ended.
        load: estimated seconds of what was sent there and is not completed; 0 where nobody
            estimates.
        kv_tokens: its KV memory.
        rows: makes a list of (prompt, generated, cap) in tokens of those requests.
        role: what it is for.
    """

    number: int
    requests: int
    load: float
    kv_tokens: int
    rows: Callable[[], list[tuple[int, int, int]]]
    role: Role = Role.MIXED


class BatchPolicy(Protocol):
    """Which pooled requests run together?

    Attributes:
        needs_cost: whether it needs prices.
        together: whether a batch is one static batch at its instance, or just sent at once.
    """

    @property
    def together(self) -> bool:
        """See the class."""
        ...

    @property
    def needs_cost(self) -> bool:
        """See the class."""
        ...

    def batches(self, lengths: Sequence[int], cost: SliceCost | None) -> list[list[int]]:
        """Indices of the requests of each batch, each request in one."""
        ...


class PlacePolicy(Protocol):
    """Which instance gets it?

    Attributes:
        needs_cost: whether it reads :attr:`InstanceView.load`.
        needs_progress: whether it calls :attr:`InstanceView.rows`, and needs them up to date.
    """

    @property
    def needs_progress(self) -> bool:
        """See the class."""
        ...

    @property
    def needs_cost(self) -> bool:
        """See the class."""
        ...

    def choose(self, instances: Sequence[InstanceView], tokens: int) -> int:
        """Index of the instance for a batch of so many tokens; there is at least one."""
        ...

    def observe(self, length: int) -> None:
        """Learn from a request that came to its own end: its output tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Interval:
    """When the pool is looked at again.

    Source: SCLS (arXiv 2406.13511), the adaptive scheduling interval:
    ``max(share * least load, least)``.

    Attributes:
        least: seconds, Gamma in the paper; 0: at every arrival.
        share: of the least loaded instance's load, lambda in the paper; 0: always ``least``.
    """

    least: float = 0.0
    share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("least", "share"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                msg = f"interval.{name} is {value}; it must be 0 or more"
                raise ValueError(msg)

    def seconds(self, loads: Sequence[float]) -> float:
        """Until the next time."""
        return max(self.share * min(loads, default=0.0), self.least)


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """A composition of answers.

    Attributes:
        slice_tokens: most output tokens that a request gets before it is back in the pool;
            0: as many as it may have.
        safety: share of an instance's KV memory that the estimates fill.
        move: whether and when requests change their instance; None: never.
        back_pressure: whether prompts wait for decode instances; None: never.
    """

    batch: BatchPolicy
    place: PlacePolicy
    interval: Interval
    slice_tokens: int = 0
    safety: float = 0.9
    move: ByGain | None = None
    back_pressure: BackPressure | None = None

    def __post_init__(self) -> None:
        if self.slice_tokens < 0:
            msg = f"slice_tokens is {self.slice_tokens}; it must be 0 (no slices) or more"
            raise ValueError(msg)
        if not 0 < self.safety <= 1:
            msg = f"safety is {self.safety}; it must be in (0, 1]"
            raise ValueError(msg)

    @property
    def needs_cost(self) -> bool:
        """Whether slices must be priced."""
        return self.batch.needs_cost or self.place.needs_cost or self.move is not None

    @property
    def priced_tokens(self) -> int:
        """Tokens of the slices whose prices it needs."""
        return self.move.slice_tokens if self.move is not None else self.slice_tokens

    @property
    def needs_progress(self) -> bool:
        """Whether the dispatcher must know how far requests are when it is asked."""
        return self.place.needs_progress or self.move is not None or self.back_pressure is not None
