"""Step time as a constant and a price for everything.

Problem: most of what a step costs is bandwidth and arithmetic, each linear in something known.
Source: the affine cost models of DistServe's and Vidur's simulators and of LightLLM's artifact.
Rule: ``step + token * prefill + work * prefill_work + request * decoding + context * context``.
Limits: no floor under small prompts, no tiles or waves: a few percent of error on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.forecast.latency.base import StepLoad


@dataclass(frozen=True, slots=True)
class Affine:
    """A constant and a price for everything, in seconds.

    Attributes:
        step: per step, host overhead included.
        token: per prompt token.
        work: per token squared of prompt attention.
        request: per decoding request.
        context: per KV token that decoding requests attend to.
    """

    step: float
    token: float
    work: float
    request: float
    context: float

    wants_longest = False

    def __post_init__(self) -> None:
        for name in ("step", "token", "work", "request", "context"):
            value = getattr(self, name)
            if not value >= 0:
                msg = f"latency.{name} is {value}; it must be 0 or more seconds"
                raise ValueError(msg)

    def seconds(self, load: StepLoad) -> float:
        """The sum."""
        return (
            self.step
            + self.token * load.prefill
            + self.work * load.prefill_work
            + self.request * load.decoding
            + self.context * load.context
        )

    def decode_line(self, decoding: int) -> tuple[float, float]:
        """Without prefill, the context is all that changes."""
        return self.step + self.request * decoding, self.context


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """One unit per step that decodes; admission and prefill cost nothing.

    The unit of the behaviour study in the Past-Future paper (arXiv 2507.10150).
    """

    wants_longest = False

    def seconds(self, load: StepLoad) -> float:
        """1 or 0."""
        return 1.0 if load.decoding else 0.0

    def decode_line(self, decoding: int) -> tuple[float, float]:
        """Always 1 where someone decodes."""
        return (1.0 if decoding else 0.0), 0.0
