"""The actor without Ray: it is a class like others."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import msgspec

from penstock.cluster.actor import MOST_EVENTS, CallPipe, Instance
from penstock.core.engine import Work
from penstock.core.types import FinishReason, Request
from penstock.server.factories import EngineSpec
from penstock.server.messages import Add, Event, Explained, Ready, Step

decode = msgspec.msgpack.Decoder(Event).decode


def spec(**given: Any) -> bytes:
    options = {"block_size": 4, "max_batch": 8, "max_step_tokens": 32, "prefix_cache": True}
    settings: dict[str, Any] = {
        "kind": "scripted",
        "model": "",
        "options": options,
        "vocab_size": 256,
        "preset": "past-future",
        "order": None,
        "parameters": {},
        "seed": 0,
    }
    return msgspec.json.encode(EngineSpec(**{**settings, **given}))


async def test_it_loads_serves_and_closes() -> None:
    instance = Instance(spec(prices=True))
    _, words = await instance.load()
    assert words == ""
    first = decode((await instance.poll())[0])
    assert isinstance(first, Ready)
    arrival = time.monotonic() - 5000.0  # a clock that has nothing to do with this one
    request = Request("a", 3, 20, arrival)
    add = Add.pack(request, Work([1, 2, 3], trace_length=6))
    await instance.submit([msgspec.msgpack.encode(add)], sent_at=arrival + 1.0)
    tokens, ended = [], []
    while not ended:
        for event in map(decode, await instance.poll()):
            assert isinstance(event, Step)
            tokens += event.tokens.values()
            ended += event.ended
            assert event.gauges.prices is not None
    assert [end.reason for end in ended] == [FinishReason.STOP]
    assert len(tokens) == 6
    await asyncio.wait_for(instance.close(), 5)


async def test_what_keeps_it_from_loading_is_said_in_words() -> None:
    instance = Instance(spec(preset="past-future", parameters={"window": -1}))
    _, words = await instance.load()
    assert "window" in words
    assert "-1" in words


async def test_an_engine_waits_for_a_front_that_is_far_behind() -> None:
    pipe = CallPipe()
    sent = 0

    def talk() -> None:
        nonlocal sent
        for number in range(MOST_EVENTS + 10):
            pipe.send(Explained(number, ""))
            sent += 1

    thread = threading.Thread(target=talk)
    thread.start()
    thread.join(0.3)
    assert sent == MOST_EVENTS
    events = list(map(decode, await pipe.take()))
    while len(events) < MOST_EVENTS + 10:
        events += map(decode, await pipe.take())
    thread.join()
    assert [event.ticket for event in events if isinstance(event, Explained)] == list(
        range(MOST_EVENTS + 10)
    )


async def test_arrivals_are_counted_by_the_clock_of_the_machine() -> None:
    pipe = CallPipe()
    add = Add.pack(Request("a", 1, 5, 100.0), Work([1]))
    pipe.put([msgspec.msgpack.encode(add)], late=7.5)
    command = pipe.receive()
    assert isinstance(command, Add)
    assert command.arrival == 107.5
    assert pipe.receive() is None
