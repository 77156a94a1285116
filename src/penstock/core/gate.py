"""Whether to take a request in at all, decided before it costs anything.

Problem: an unbounded queue turns every answer late; a refusal that says when to come
back costs nothing and can be acted on.
Source: our own; see the threads on bounded queues in vLLM and SGLang.
Rule: refuse when the waiting requests or their prompt tokens have reached a limit, and
refuse a request that would be given up anyway (``on_miss: expire``) when its predicted
wait exceeds its TTFT.  ``retry_after`` is the predicted wait, or the part of it that exceeds the
TTFT.
Limits: the prediction is as good as :mod:`penstock.core.forecast.wait`; while that knows
nothing, nobody is refused because of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.core.types import OnMiss, Request

_UNKNOWN_WAIT = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the waiting queue; 0 is unbounded."""

    max_waiting: int = 0
    max_waiting_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_waiting_tokens"):
            value = getattr(self, name)
            if value < 0:
                msg = f"{name} is {value}; it must be 0 (unbounded) or more"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True)
class Load:
    """What the gate needs to know.

    Attributes:
        waiting: requests that wait.
        waiting_tokens: prompt tokens of those.
        rate: admissions per second out of the queue; None while unknown.
    """

    waiting: int
    waiting_tokens: int
    rate: float | None

    @property
    def predicted_wait(self) -> float:
        """Seconds until a request that came now would be admitted."""
        if self.waiting == 0:
            return 0.0
        return self.waiting / self.rate if self.rate else _UNKNOWN_WAIT


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not taken in.

    Attributes:
        reason: in words, with the numbers.
        predicted_wait: seconds it would have waited.
        retry_after: whole seconds after which to try again, at least 1.
        limit: name of the limit that was hit.
    """

    reason: str
    predicted_wait: float
    retry_after: int
    limit: str


def gate(load: Load, request: Request, limits: Limits) -> Refusal | None:
    """Refuse, or None to take the request in."""
    wait = load.predicted_wait
    if limits.max_waiting and load.waiting >= limits.max_waiting:
        reason = f"{load.waiting} requests are waiting; the limit is {limits.max_waiting}"
        return _refusal(reason, wait, wait, "max_waiting")
    tokens = load.waiting_tokens + request.prompt_tokens
    if limits.max_waiting_tokens and load.waiting and tokens > limits.max_waiting_tokens:
        reason = (
            f"{load.waiting_tokens} prompt tokens are waiting and this request has "
            f"{request.prompt_tokens}; the limit is {limits.max_waiting_tokens}"
        )
        return _refusal(reason, wait, wait, "max_waiting_tokens")
    ttft = request.slo.ttft
    known = load.waiting == 0 or load.rate is not None
    if request.on_miss is OnMiss.EXPIRE and ttft is not None and known and wait > ttft:
        reason = f"the predicted wait of {wait:.2f} s exceeds the TTFT promise of {ttft:g} s"
        return _refusal(reason, wait, wait - ttft, "slo.ttft")
    return None


def _refusal(reason: str, wait: float, after: float, limit: str) -> Refusal:
    return Refusal(reason, wait, max(1, math.ceil(after)), limit)
