"""Kairos's slack-guided batches, as the paper prints them.

Problem: a decode step takes as long as its longest sequence needs; the short ones idle.
Source: Kairos (arXiv 2605.02329), Algorithm 3 and Eq. 2.
Rule: a request's slack is the time until its next token is due at the promised pace, counted from
its first token, less a step of it alone.  Go through the requests from the shortest context up and
take each whose step, with those taken, fits the least slack of all and raises tokens per second.
If none fits, all decode.  Step times come from a table by batch size and longest context that
follows the measured steps.
Limits: one request that is late already makes every step a full one; slacks are judged as if each
request could run alone next; the table knows only the longest context, and without a profile it
begins with a guess; a long request may be kept waiting as long as its mean pace allows.
:mod:`penstock.core.policies.pack.slack` repairs these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.lookup import LookUpTable
from penstock.core.snapshot import Decoding, Ints

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTHS = tuple(1 << power for power in range(7, 21))
_PROFILED = 100


def step_table(profile: LatencyModel | None) -> LookUpTable:
    """A table as profiled; without a profile, a guess that the first measured steps replace."""
    cells = {
        (batch, length): 0.01
        + (
            1e-7 * length
            if profile is None
            else profile.seconds(StepLoad(batch, batch * length, longest=length)) - 0.01
        )
        for batch in _BATCHES
        for length in _LENGTHS
    }
    return LookUpTable(cells, 1e4, weight=1 if profile is None else _PROFILED)


@dataclass(slots=True)
class SlackLiteral:
    """Algorithm 3.

    Attributes:
        tpot: seconds per token for requests that were promised nothing.
        table: step times.
    """

    tpot: float = 0.05
    table: LookUpTable = field(default_factory=lambda: step_table(None))

    def __post_init__(self) -> None:
        if not 0 < self.tpot < float("inf"):
            msg = f"tpot is {self.tpot}; it must be a positive number of seconds"
            raise ValueError(msg)

    def choose(self, decoding: Decoding, now: float) -> Ints | None:
        """The rows of the paper's B; None for all."""
        step, order = self.table.step, decoding.context.argsort(kind="stable")
        pace = np.where(np.isfinite(decoding.tpot), decoding.tpot, self.tpot)
        alone = np.array([step(1, length) for length in decoding.context.tolist()])
        # The first token is the prefill's; the paper counts those generated since.
        slack = decoding.first + pace * decoding.generated - now - alone
        least = float(slack.min())
        chosen: list[int] = []
        current = 0.0
        for row in order.tolist():
            count = len(chosen)
            seconds = step(count + 1, float(decoding.context[row]))
            if seconds <= least and (not chosen or (count + 1) / seconds > count / current):
                chosen.append(row)
                current = seconds
        return np.array(chosen, dtype=np.int64) if chosen else None

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Update the table."""
        self.table.observe(load, seconds)

    def ended(self, length: int) -> None:
        """Nothing to learn."""
