"""Paced delivery: tokens that come early are released on time, and nothing is lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from penstock.core.engine import Work
from penstock.core.gate import Limits
from penstock.core.types import SLO, FinishReason, OnMiss, Request
from penstock.models import demo_path
from penstock.server.choice import Choice, Mailbox, Times, met
from penstock.server.client import EngineClient
from penstock.server.errors import unavailable
from penstock.server.messages import Command, End, Gauges, Ready, Step
from penstock.server.slo import Promise
from penstock.text.stream import TextStream
from penstock.text.tokenizer import TextTokenizer, load_tokenizer

GAUGES = Gauges(1, 1, 0, 0, 0.1, 0, None)


class Nobody:
    """A backend and an observer that note."""

    ready = True

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.ended: list[str] = []
        self.gaps: list[float | None] = []

    def send(self, command: Command) -> None:
        self.sent.append(command)

    async def run(self) -> None:
        raise AssertionError

    def on_step(self, step: Step) -> None:
        """Not counted."""

    def on_token(self, choice: Choice, gap: float | None) -> None:
        assert not choice.ended
        self.gaps.append(gap)

    def on_end(self, choice: Choice) -> None:
        self.ended.append(choice.id)


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return load_tokenizer(demo_path())


def start(text: TextTokenizer, slo: SLO | float | None) -> tuple[EngineClient, Nobody, Choice]:
    nobody = Nobody()
    client = EngineClient(Limits(), nobody, paced=True)
    client.attach(nobody)
    client.on_ready(Ready(10, 16, 8, 64, 100))
    bounds = slo if isinstance(slo, SLO) else SLO(tpot=slo)
    promise = Promise("default", bounds, OnMiss.KEEP)
    now = time.monotonic()
    choice = Choice("r", 0, 0, 3, promise, Times(now), TextStream(text), Mailbox())
    client.submit(choice, Request("r", 3, 20, now), Work([1, 2, 3]))
    return client, nobody, choice


def step(*tokens: int, end: bool = False) -> list[Step]:
    """A step for each token; the request ends with the last one."""
    made = [Step({"r": token}, {}, [], 0.0, 0.0, GAUGES) for token in tokens]
    if end:
        ended = [End("r", FinishReason.STOP, len(tokens), 0, "")]
        made[-1] = Step(made[-1].tokens, {}, ended, 0.0, 0.0, GAUGES)
    return made


async def test_a_burst_is_released_at_the_promised_pace(text: TextTokenizer) -> None:
    client, nobody, choice = start(text, 0.02)
    for one in step(300, 301, 302, 303, 304, end=True):
        client.on_event(one)
    assert choice.tokens == 1
    assert not choice.ended
    for _ in range(1000):
        await asyncio.sleep(0.002)
        if choice.ended:
            break
    assert choice.tokens == 5
    assert choice.times.last - choice.times.first >= 0.07
    assert all(gap is None or gap > 0.01 for gap in nobody.gaps)
    assert nobody.ended == ["r"]
    assert client.open_requests == 0


@pytest.mark.parametrize(
    "slo",
    [
        SLO(tpot=0.02),
        SLO(tpot=0.05, e2e=0.12),
        SLO(tpot=0.1, gap=0.03),
        SLO(tpot=0.003),
    ],
)
async def test_pacing_breaks_no_promise(text: TextTokenizer, slo: SLO) -> None:
    """All tokens were there at once; what is told is in time by every bound, and paced by one."""
    client, _, choice = start(text, slo)
    for one in step(300, 301, 302, 303, 304, end=True):
        client.on_event(one)
    for _ in range(1000):
        await asyncio.sleep(0.001)
        if choice.ended:
            break
    assert choice.tokens == 5
    assert met(choice), choice.times
    assert choice.times.last - choice.times.first > 0.004


async def test_without_a_promise_nothing_waits(text: TextTokenizer) -> None:
    client, _, choice = start(text, None)
    for one in step(300, 301, 302, end=True):
        client.on_event(one)
    assert choice.ended
    assert choice.tokens == 3


async def test_a_late_token_is_not_made_later(text: TextTokenizer) -> None:
    client, _, choice = start(text, 0.001)
    for one in step(300, 301, 302):
        await asyncio.sleep(0.01)
        client.on_event(one)
    assert choice.tokens == 3


async def test_what_was_kept_is_told_when_the_engine_dies(text: TextTokenizer) -> None:
    client, nobody, choice = start(text, 5.0)
    for one in step(300, 301, 302):
        client.on_event(one)
    client.fail_all(unavailable("it died", "engine_died"))
    assert choice.tokens == 3
    assert choice.error is not None
    ended, _, done = start(text, 5.0)
    for one in step(300, 301, end=True):
        ended.on_event(one)
    ended.fail_all(unavailable("it died", "engine_died"))
    assert done.error is None, "it had come to its end"
    assert done.finish_reason == "stop"
    assert nobody.ended == ["r"]


async def test_who_leaves_is_told_nothing_more(text: TextTokenizer) -> None:
    client, _, choice = start(text, 0.01)
    for one in step(300, 301, 302, end=True):
        client.on_event(one)
    client.cancel(choice)
    await asyncio.sleep(0.05)
    assert choice.tokens == 1
    assert choice.reason is FinishReason.CANCELLED
