"""Step times in which the longest sequence holds up the others.

Problem: on some machines a decode step's time follows its longest context, not their sum.
Source: Kairos (arXiv 2605.02329), whose measurements are of this kind: a step of one sequence of
128K tokens takes four times one of 8K, and together they take what the longer one does.
Rule: a constant; prices per further request, per token of the longest context, and per token of
all other contexts; prompts by token and by attention's work.
Limits: two prices stand for what kernels do; a fit on sums alone would be wrong by several times.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from penstock.core.forecast.latency.base import StepLoad


@dataclass(frozen=True, slots=True)
class LongestBound:
    """Prices in seconds.

    Attributes:
        step: of a step in which somebody decodes, its first request included.
        request: per further decoding request.
        longest: per token of the longest context.
        context: per token of the other contexts.
        token: per prompt token.
        work: per prompt token and token that it attends to.
    """

    step: float
    request: float
    longest: float
    context: float
    token: float
    work: float

    wants_longest = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                msg = f"{field.name} is {value}; it must be 0 or more"
                raise ValueError(msg)

    def seconds(self, load: StepLoad) -> float:
        """Decoding and prompts, one after the other."""
        total = self.token * load.prefill + self.work * load.prefill_work
        if load.decoding:
            longest = load.longest or load.context / load.decoding
            total += self.step + self.request * (load.decoding - 1)
            total += self.longest * longest + self.context * (load.context - longest)
        return total

    def decode_line(self, decoding: int) -> None:
        """It is not affine in the sum of the contexts."""
        del decoding
