"""The most prompts in time: those that can make it by deadline, the others after them.

Problem: Kairos's printed score picks the longest among late requests, and may starve
(:mod:`penstock.core.policies.order.urgency_literal`).
Source: Kairos (arXiv 2605.02329) for the aim; Moore (1968, with Hodgson) for the rule, which
keeps the most jobs of one machine in time; the share of the others is our own.
Rule: go through the requests by deadline, adding up their times; whenever one would be late,
give up the longest of those so far.  Those kept run by deadline.  Those given up come after them,
the shortest first, but one step in ``1 / lost_share`` begins with the oldest of them, so that
each ends.  Requests that have output already, evicted or handed over, come before all: the short
before the long, those that have waited for ``patience`` after them, but for the oldest of these,
one in ``patience * lost_share`` seconds, which comes first of all until it has its memory.  All is
made anew before every step, so a request given up comes back where time is found.
Limits: knows nothing of who will arrive; a prompt that cannot make it at all gets the lost share
only, under load: the oldest lost one computes a step's tokens in every ``1 / lost_share`` steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.prompt_time import LengthAware, PromptTime
from penstock.core.snapshot import Ints, Prompts


@dataclass(slots=True)
class Urgency:
    """Those who can be in time, by deadline.

    Attributes:
        lost_share: of the steps begins with the oldest of those who cannot, in (0, 1].
        patience: seconds after its arrival for which a request with output counts as fresh.
        time: how long prompts take.
    """

    lost_share: float = 0.1
    patience: float = 30.0
    time: PromptTime = field(default_factory=LengthAware)
    _since: int = 0
    _favoured: int = -1
    _favour_again: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lost_share <= 1:
            msg = f"lost_share is {self.lost_share}; it must be in (0, 1]"
            raise ValueError(msg)

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """Continuing, kept, lost; now and then the oldest lost one first."""
        seconds = self.time.seconds(prompts.computed, prompts.tokens)
        continuing = prompts.generated > 0
        deadline = np.where(continuing, -np.inf, prompts.arrival + prompts.ttft)
        aged = continuing & (now - prompts.arrival >= self.patience)
        size = np.where(continuing, prompts.tokens, 0)
        size[prompts.seq == self._favour(prompts.seq[aged], now)] = 0
        order = np.lexsort((prompts.seq, size, aged & (size > 0), deadline))
        kept, lost = _most_in_time(order.tolist(), seconds.tolist(), deadline.tolist(), now)
        if not lost:
            self._since = 0
            return order
        rows = np.array(lost, dtype=np.int64)
        seq = prompts.seq[rows]
        shortest = rows[np.lexsort((seq, seconds[rows]))]
        self._since += 1
        if self._since >= ceil(1 / self.lost_share):
            self._since = 0
            oldest = rows[seq.argmin()]
            kept.insert(0, int(oldest))
            shortest = shortest[shortest != oldest]
        return np.concatenate((np.array(kept, dtype=np.int64), shortest))

    def _favour(self, aged: Ints, now: float) -> int:
        """Which of those who have waited long, by their ``seq``, comes first; -1: none."""
        if self._favoured in aged:
            return self._favoured
        self._favoured = -1
        if len(aged) and now >= self._favour_again:
            self._favoured = int(aged.min())
            self._favour_again = now + self.patience * self.lost_share
        return self._favoured

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn how long prompts take."""
        self.time.observe(load, seconds)


def _most_in_time(
    order: list[int], seconds: list[float], deadline: list[float], now: float
) -> tuple[list[int], list[int]]:
    """Rows that can be in time, as many as possible, by deadline; and the others.

    Those without a deadline behind them (minus infinity) are kept and take their time.
    """
    longest: list[tuple[float, int]] = []
    given_up: set[int] = set()
    end = now
    for row in order:
        end += seconds[row]
        if deadline[row] == -np.inf:
            continue
        heappush(longest, (-seconds[row], row))
        if end > deadline[row]:
            time, out = heappop(longest)
            end += time
            given_up.add(out)
    return [row for row in order if row not in given_up], list(given_up)
