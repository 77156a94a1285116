"""What a step computes, and what a model of its duration looks like.

Problem: a forecast in seconds, and a simulator, are as true as their step times.
Source: the features are those that explain measured steps of vLLM, of our own engine, and in
the cost models of DistServe, Vidur, SCLS (arXiv 2406.13511) and Kairos (arXiv 2605.02329).
Limits: coefficients hold for one model on one machine; they are to be fitted, not believed.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class StepLoad(NamedTuple):
    """What a step computes.

    Attributes:
        decoding: requests that decode.
        context: KV tokens those attend to, summed, their newest tokens included.
        prefill: prompt tokens computed (recomputed ones count).
        prefill_work: sum over chunks of tokens x (mean context of the chunk), in tokens
            squared: the work of prompt attention.
        chunks: prompt chunks, one request each.
        longest: longest context of a decoding request, in tokens; kept only for models
            whose ``wants_longest`` is true, else 0.
    """

    decoding: int
    context: int
    prefill: int = 0
    prefill_work: float = 0.0
    chunks: int = 0
    longest: int = 0


class LatencyModel(Protocol):
    """Predicts the duration of a step.

    Attributes:
        wants_longest: whether it reads ``StepLoad.longest``.
    """

    @property
    def wants_longest(self) -> bool:
        """See the class."""
        ...

    def seconds(self, load: StepLoad) -> float:
        """Duration of a step that is not empty."""
        ...

    def decode_line(self, decoding: int) -> tuple[float, float] | None:
        """Seconds of a decode-only step of so many requests as (constant, per context token).

        None if they are not affine in the context.  A simulator adds up a stretch of such
        steps in closed form.
        """
        ...
