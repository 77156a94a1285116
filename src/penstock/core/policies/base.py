"""What a policy for each question looks like, and their composition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.snapshot import Candidate, Columns, Decoding, Ints, Prompts, Snapshot
from penstock.core.types import Ended, Request


@dataclass(frozen=True, slots=True)
class Admit:
    """Give it memory now."""


ADMIT = Admit()
"""The one there need be."""


@dataclass(frozen=True, slots=True)
class Defer:
    """Not now; ``reason`` says why, in numbers, for whoever asks."""

    reason: str


@dataclass(frozen=True, slots=True)
class Skip:
    """Not now, for a reason that is its own: those behind it are asked all the same.

    It is asked again in every pass.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Never: end it as rejected, and say why."""

    reason: str


Answer: TypeAlias = Admit | Defer | Skip | Reject
Judge: TypeAlias = Callable[[Candidate], Answer]
OrderKey: TypeAlias = tuple[float, ...]


class OrderPolicy(Protocol):
    """Who is considered first?  Smaller keys first; ties by order of arrival."""

    def key(self, request: Request) -> OrderKey:
        """A key that does not change while the request waits."""
        ...


class RankPolicy(Protocol):
    """Who computes its prompt first, asked anew before every step?

    Where a policy has one, its answer holds for those that wait and for those whose prompt is
    half done alike: a request is interrupted at the end of a chunk when another comes before it.
    """

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """Rows of ``prompts``, each once, the first first."""
        ...

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step."""
        ...


class PackPolicy(Protocol):
    """Which of the decoding requests advance in this step?  The others keep their KV memory."""

    def choose(self, decoding: Decoding, now: float) -> Ints | None:
        """Rows of ``decoding`` that advance, at least one; None: all.

        ``decoding`` has at least two.
        """
        ...

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step."""
        ...

    def ended(self, length: int) -> None:
        """Learn from a request that came to its own end: its output tokens."""
        ...


class AdmitPolicy(Protocol):
    """May the head of the order take KV memory now?

    Attributes:
        holds: steps for which a deferral holds while no memory is given back, so that
            there is no need to ask again; None: for as long as none is given back.
    """

    @property
    def holds(self) -> int | None:
        """See the class."""
        ...

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass: a function that answers for one candidate after another.

        The function takes it that every candidate it admitted was started.
        """
        ...

    def observe(self, ended: Ended) -> None:
        """Learn from a request's end."""
        ...

    def learn_true_length(self, request_id: str, length: int) -> None:
        """For the oracle only; every other policy must do nothing here."""
        ...


class Split(NamedTuple):
    """How a step's tokens are shared out.

    ``decode``: whether the decoding requests advance.  ``prefill``: most tokens for chunks.
    """

    decode: bool
    prefill: int


class SharePolicy(Protocol):
    """How many tokens does each admitted request get in this step?

    Attributes:
        steady: whether the answer depends on who runs only, not on the time or on how far
            they are: while nobody comes or goes, it need not be asked again.
    """

    @property
    def steady(self) -> bool:
        """See the class."""
        ...

    def split(self, view: Snapshot, max_step_tokens: int) -> Split:
        """Divide at most ``max_step_tokens``."""
        ...


class VictimPolicy(Protocol):
    """Who gives memory back when it overflows?"""

    def choose(self, running: Columns) -> int:
        """Row of the victim; ``running`` is not empty."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A composition of answers.

    Attributes:
        period: steps from one admission pass to the next (``max_wait_tokens`` in LightLLM).
        per_pass: most requests admitted in one pass; 0 is no limit.
        at_once: a pass goes on where the step has no tokens left for prompts: a static batch
            enters whole, and who has no chunk yet has one later.
        rank: an order that is asked before every step, instead of ``order``; None: ``order``.
        pack: which decoding requests advance; None: all.
    """

    order: OrderPolicy
    admit: AdmitPolicy
    share: SharePolicy
    victim: VictimPolicy
    period: int = 1
    per_pass: int = 0
    at_once: bool = False
    rank: RankPolicy | None = None
    pack: PackPolicy | None = None

    def __post_init__(self) -> None:
        if self.period < 1:
            msg = f"period is {self.period}; it must be at least 1 step"
            raise ValueError(msg)
        if self.per_pass < 0:
            msg = f"per_pass is {self.per_pass}; it must be 0 (no limit) or more"
            raise ValueError(msg)
