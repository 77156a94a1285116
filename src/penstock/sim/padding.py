"""What a static batch computes that nobody needs: padding, and rows that have ended.

Problem: engines that run a batch as one rectangle compute every row at the longest one's length,
and go on computing rows that have ended until the last one has.
Source: the pad tokens and invalid tokens of SCLS (arXiv 2406.13511).
Rule: a batch begins when requests start and none of the last one is left.  Its prompts are padded
to the longest; all its rows take part in every decode step, at the longest one's context.
Limits: prompts that are cut into chunks are padded chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.types import RequestId, StepPlan


@dataclass(slots=True)
class Rectangle:
    """The batch that runs, and what all batches so far computed in vain.

    Attributes:
        rows: requests of the batch, those that have ended included.
        length: tokens of its longest row.
        batches: rows of each batch so far, in order.
        pad_tokens: prompt tokens computed only to fill the rectangles.
        invalid_tokens: output tokens computed for rows that had ended.
    """

    rows: int = 0
    length: int = 0
    batches: list[int] = field(default_factory=list)
    pad_tokens: int = 0
    invalid_tokens: int = 0
    _alive: set[RequestId] = field(default_factory=set)

    @property
    def context(self) -> int:
        """KV tokens that a decode step reads, the newest included."""
        return self.rows * self.length

    def enter(self, plan: StepPlan) -> None:
        """A plan begins: who leaves, who starts."""
        self._alive.difference_update([drop.id for drop in plan.drops])
        if plan.starts:
            if not self._alive:
                self.rows = self.length = 0
                self.batches.append(0)
            self._alive.update([start.id for start in plan.starts])
            self.batches[-1] += len(plan.starts)

    def prompts(self, plan: StepPlan) -> StepLoad:
        """What its chunks cost, padded."""
        count = len(plan.chunks)
        longest = max(chunk.tokens for chunk in plan.chunks)
        before = max(chunk.start for chunk in plan.chunks)
        tokens = count * longest
        self.pad_tokens += tokens - sum(chunk.tokens for chunk in plan.chunks)
        for chunk in plan.chunks:
            if chunk.samples:
                self.rows += 1
                self.length = max(self.length, chunk.start + chunk.tokens + 1)
        return StepLoad(0, 0, tokens, tokens * (before + longest / 2), count)

    def decoded(self, steps: int, valid: int) -> None:
        """So many steps were run, in which ``valid`` rows had not ended."""
        self.length += steps
        self.invalid_tokens += steps * (self.rows - valid)
