"""What the counts are kept in."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.types import SLO, FinishReason, OnMiss
from penstock.server.choice import Choice, Mailbox, Times
from penstock.server.metrics import Metrics
from penstock.server.slo import Promise


def ended(at: float, tokens: int) -> Choice:
    text: Any = None  # nothing is said
    promise = Promise("default", SLO(), OnMiss.KEEP)
    choice = Choice("r", 0, 0, 1, promise, Times(at), text, Mailbox(), tokens=tokens)
    choice.times.first = choice.times.last = choice.times.end = at
    choice.reason, choice.finish_reason = FinishReason.STOP, "stop"
    return choice


def test_goodput_is_of_the_last_ten_seconds() -> None:
    metrics = Metrics("demo")
    for second in range(20):
        metrics.on_end(ended(float(second), 3))
    assert metrics.goodput_rate(24.5) == pytest.approx(5 * 3 / 10)


def test_memory_does_not_grow_when_nobody_asks_for_the_goodput() -> None:
    metrics = Metrics("demo")
    for second in range(1000):
        metrics.on_end(ended(float(second), 3))
    assert len(metrics._recent) == 11
