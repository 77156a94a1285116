"""Kairos's urgency, as the paper prints it.

Problem: under first come first served a long prompt blocks the short ones behind it.
Source: Kairos (arXiv 2605.02329), Algorithms 1 and 2 and Eq. 1.
Rule: predict when each would finish first come first served, by a running average of tokens per
second; what then is left of its TTFT, as a share of it, divided by the prompt's length, is its
score; the largest score first.  Scores are made anew before every step.  Without a promise the
share is 1.
Limits: among requests that would be late the division by the length favours the longest, the
opposite of what is meant; a request whose time runs out sinks; nothing bounds how long a long one
waits.  :mod:`penstock.core.policies.order.urgency` repairs these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.prompt_time import PromptTime, RunningRate
from penstock.core.snapshot import Ints, Prompts


@dataclass(slots=True)
class UrgencyLiteral:
    """Largest normalized slack per token first.

    Attributes:
        time: how long prompts take.
    """

    time: PromptTime = field(default_factory=RunningRate)

    def rank(self, prompts: Prompts, now: float) -> Ints:
        """By descending score; one cumulative pass predicts all."""
        fcfs = prompts.seq.argsort(kind="stable")
        finish = np.empty(len(fcfs))
        finish[fcfs] = now + self.time.seconds(prompts.computed, prompts.tokens)[fcfs].cumsum()
        promised = np.isfinite(prompts.ttft)
        bound = np.where(promised, prompts.ttft, 1.0)
        share = np.where(promised, 1 - (finish - prompts.arrival) / bound, 1.0)
        order: Ints = np.lexsort((prompts.seq, -share / prompts.tokens))
        return order

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn how long prompts take."""
        self.time.observe(load, seconds)
