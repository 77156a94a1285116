"""The tokens of one simulated request: how many, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import RequestId
from penstock.sim.ticks import TickTimes


@dataclass(slots=True)
class Stretch:
    """Tokens that a request got without interruption.

    Attributes:
        sampled_at: when the token of its last prompt chunk came, in seconds; None if the
            stretch resumes after steps that the request sat out.
        first, last: the decode ticks that followed; none if ``last < first``.
    """

    sampled_at: float | None
    first: int = 1
    last: int = 0


@dataclass(slots=True, eq=False)
class Track:
    """A request in the simulated machine.  While it decodes, it has ``base + ticks`` tokens.

    Attributes:
        prompt, length: tokens; the length is the true one of the output.
        first_at, last_at: when its first and its latest token came, in seconds; None before.
        gap: largest time between two of its tokens so far, in seconds; None before the second.
    """

    id: RequestId
    prompt: int
    length: int
    generated: int = 0
    base: int = 0
    decodes: bool = False
    first_at: float | None = None
    last_at: float | None = None
    gap: float | None = None
    segment: int = 0
    swapped: int = 0
    started: bool = False
    stretches: list[Stretch] = field(default_factory=list)

    def sampled(self, at: float) -> None:
        """A prompt chunk yielded a token."""
        if self.last_at is None:
            self.first_at = at
        else:
            self.gap = max(self.gap or 0.0, at - self.last_at)
        self.last_at = at
        self.generated += 1
        self.stretches.append(Stretch(at))

    def joins(self, ticks: TickTimes) -> None:
        """It has a token in every tick from the next one on."""
        self.decodes = True
        self.base = self.generated - ticks.count
        self.segment = len(ticks.segments)
        stretch = self.stretches[-1]
        if stretch.last >= stretch.first:
            stretch = Stretch(None)
            self.stretches.append(stretch)
        stretch.first, stretch.last = ticks.count + 1, ticks.count

    def leaves(self, ticks: TickTimes) -> None:
        """It has no token in the next tick."""
        self.settle(ticks)
        self.decodes = False

    def settle(self, ticks: TickTimes) -> None:
        """Write down what happened up to now; it decodes."""
        stretch = self.stretches[-1]
        self.generated = self.base + ticks.count
        stretch.last = ticks.count
        if stretch.last < stretch.first:
            return
        assert self.last_at is not None
        gap = ticks.largest_gap(stretch.first)
        if self.gap is not None and self.gap > gap:
            gap = self.gap
        before = ticks.segments[self.segment].time(stretch.first) - self.last_at
        self.gap = max(before, gap)
        self.last_at = ticks.last
