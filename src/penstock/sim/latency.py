"""How long a step takes: models behind one interface.

Problem: a simulator is as true as its step times.
Source: affine costs as in DistServe's and Vidur's simulators and in LightLLM's artifact;
the features are those that explain measured steps of vLLM and of our own engine.
Limits: coefficients hold for one model on one machine; they are to be fitted, not believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes.

    Attributes:
        decoding: requests that decode.
        context: KV tokens those attend to, summed.
        prefill: prompt tokens computed.
        prefill_work: sum over chunks of tokens x (mean context of the chunk), in tokens
            squared: the work of prompt attention.
    """

    decoding: int
    context: int
    prefill: int
    prefill_work: float


class LatencyModel(Protocol):
    """Predicts the duration of a step."""

    def seconds(self, load: StepLoad) -> float:
        """Duration of a step that is not empty."""
        ...


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


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """One unit per step that decodes; admission and prefill cost nothing.

    The unit of the behaviour study in the Past-Future paper (arXiv 2507.10150).
    """

    def seconds(self, load: StepLoad) -> float:
        """1 or 0."""
        return 1.0 if load.decoding else 0.0
