"""Orders by one number per prompt, made anew before every step: what Kairos is compared with.

Problem: the field's answers to "which prompt first?" that need no more than a line each.
Source: shortest first: LMCache's prefill nodes; earliest deadline: Jackson (1955); least laxity:
Mok (1983); aged weighted shortest remaining: after PREFLOW's description.
Rule: the smallest number first; ties by arrival.  Requests that have output already, evicted ones,
come before all.
Limits: shortest first starves the long; deadlines alone, and laxity, give the machine to those who
are late already, and under overload everyone is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.prompt_time import PromptTime, RunningRate
from penstock.core.snapshot import Floats, Ints, Prompts


def _by(number: Floats, prompts: Prompts) -> Ints:
    order: Ints = np.lexsort((prompts.seq, number, prompts.generated == 0))
    return order


@dataclass(frozen=True, slots=True)
class ShortestPrefill:
    """The fewest tokens first, those that are computed already included."""

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """By length."""
        del now
        return _by(prompts.tokens.astype(np.float64), prompts)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True)
class EarliestDeadline:
    """Whose TTFT ends first."""

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """By arrival plus promise."""
        del now
        return _by(prompts.arrival + prompts.ttft, prompts)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Nothing to learn."""


@dataclass(slots=True)
class LeastLaxity:
    """Who could wait least, if it ran alone from then on.

    Attributes:
        time: how long prompts take.
    """

    time: PromptTime = field(default_factory=RunningRate)

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """By deadline less its own time."""
        del now
        own = self.time.seconds(prompts.computed, prompts.tokens)
        return _by(prompts.arrival + prompts.ttft - own, prompts)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn how long prompts take."""
        self.time.observe(load, seconds)


@dataclass(frozen=True, slots=True)
class AgedShortest:
    """The fewest tokens left first, divided by a weight that grows as a request waits.

    Attributes:
        without_promise: seconds in which the weight of a request without a TTFT doubles; that of
            others does in their TTFT.
    """

    without_promise: float = 8.0

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """By tokens left over the weight."""
        age = np.maximum(now - prompts.arrival, 0)
        doubling = np.where(np.isfinite(prompts.ttft), prompts.ttft, self.without_promise)
        return _by(prompts.left / (1 + age / doubling), prompts)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Nothing to learn."""
