"""Step time of a GPU: linear layers bound by memory or by arithmetic, and attention besides.

Problem: a small step costs the reading of all weights whatever it computes, a large one costs its
arithmetic; a sum of both, or either alone, is wrong by the other.
Source: the roofline model (Williams et al., CACM 2009), as LLM serving cost models use it.
Rule: ``host + max(weights, base + token * (prefill + decoding)) + request * decoding
+ context * context + work * prefill_work``.
Limits: the passage from one bound to the other is sharper than on real GPUs, and tiles of the
matrix kernels are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from penstock.core.forecast.latency.base import StepLoad


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds each.

    Attributes:
        host: per step, before and after the GPU's work.
        weights: to read all weights once.
        base: constant part of a step bound by arithmetic.
        token: arithmetic of a token in the linear layers.
        request: per decoding request, beyond its token.
        context: per KV token that decoding requests attend to.
        work: per token squared of prompt attention.
    """

    host: float
    weights: float
    base: float
    token: float
    request: float
    context: float
    work: float

    wants_longest = False
    least_host = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                msg = f"latency.{field.name} is {value}; it must be 0 or more seconds"
                raise ValueError(msg)

    def with_host(self, seconds: float) -> Roofline:
        """The same with another time of the host per step."""
        return replace(self, host=seconds)

    def seconds(self, load: StepLoad) -> float:
        """The larger bound of the linear layers, and the rest."""
        decoding = load.decoding
        linear = self.base + self.token * (load.prefill + decoding)
        linear = max(linear, self.weights)
        return (
            self.host
            + linear
            + self.request * decoding
            + self.context * load.context
            + self.work * load.prefill_work
        )

    def decode_line(self, decoding: int) -> tuple[float, float]:
        """Without prefill, the context is all that changes."""
        linear = max(self.weights, self.base + self.token * decoding)
        return self.host + linear + self.request * decoding, self.context
