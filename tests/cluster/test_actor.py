"""The actor without Ray: it is a class like others."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from penstock.cluster import transports
from penstock.cluster.actor import MOST_EVENTS, CallPipe, Instance
from penstock.cluster.parcels import Desk, Inline, Packed, Parcel, ParcelLostError, Weighed
from penstock.core.engine import Work
from penstock.core.types import FinishReason, Request
from penstock.server.factories import EngineSpec, kv_codec
from penstock.server.messages import Add, Brought, Cancel, Event, Explained, Missed, Ready, Step
from penstock.testing.scripted import ScriptedKV

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
    (raw, *_), _ = await instance.poll()
    first = decode(raw)
    assert isinstance(first, Ready)
    arrival = time.monotonic() - 5000.0  # a clock that has nothing to do with this one
    request = Request("a", 3, 20, arrival)
    add = Add.pack(request, Work([1, 2, 3], trace_length=6))
    await instance.submit([msgspec.msgpack.encode(add)], arrival + 1.0, {}, [])
    tokens, ended = [], []
    while not ended:
        for event in map(decode, (await instance.poll())[0]):
            assert isinstance(event, Step)
            tokens += event.tokens.values()
            ended += event.ended
            assert event.gauges.prices is not None
    assert [end.reason for end in ended] == [FinishReason.STOP]
    assert len(tokens) == 6
    await asyncio.wait_for(instance.close(), 5)


async def news(instance: Instance) -> tuple[list[Event], dict[str, list[Packed]]]:
    raw, packed = await instance.poll()
    return [decode(one) for one in raw], packed


async def run_to_end(instance: Instance) -> tuple[list[int], dict[str, list[Packed]], list[Event]]:
    """Tokens until a request's end, the KV that it left, and what else was said."""
    tokens: list[int] = []
    left: dict[str, list[Packed]] = {}
    said: list[Event] = []
    ended = False
    while not ended:
        events, packed = await asyncio.wait_for(news(instance), 10)
        for slice_id, parts in packed.items():
            left.setdefault(slice_id, []).extend(parts)
        for event in events:
            if isinstance(event, Step):
                tokens += event.tokens.values()
                ended = ended or bool(event.ended)
            else:
                said.append(event)
            ended = ended or isinstance(event, Missed)
    return tokens, left, said


async def test_one_actor_goes_on_where_another_ended() -> None:
    pytest.importorskip("ray")
    one, other = (Instance(spec(kv_transport="inline")) for _ in range(2))
    for instance in (one, other):
        await instance.load()
        await instance.poll()
    now = time.monotonic()
    work = Work(list(range(40)), trace_length=6)
    # 32 tokens in the first step, whose KV goes ahead.
    first = Add.pack(Request("a", 40, 1, now), work._replace(keep_kv=True, stream_kv=True))
    whole = Add.pack(Request("b", 40, 20, now), work)
    await one.submit([msgspec.msgpack.encode(first)], now, {}, [])
    begun, left, _ = await run_to_end(one)
    assert set(left) == {"a"}
    assert [part.last for part in left["a"]] == [False, True]
    await one.submit([msgspec.msgpack.encode(whole)], now, {}, [])
    expected, nothing, _ = await run_to_end(one)
    assert nothing == {}
    rest = Request("a~1", 40, 20, now, generated=1, computed=40, first_token=now)
    add = msgspec.msgpack.encode(Add.pack(rest, work._replace(generated=begun)))
    await other.submit([add], now, {"a~1": [part.parcel for part in left["a"]]}, [])
    ended, _, said = await run_to_end(other)
    assert begun + ended == expected
    assert said == [Brought("a~1", sum(part.size for part in left["a"]))]
    broken = msgspec.msgpack.encode(Add.pack(rest, work._replace(generated=begun)))
    await other.submit([broken], now, {"a~1": [b"not KV"]}, [])
    _, _, said = await run_to_end(other)
    assert isinstance(said[0], Missed)
    for instance in (one, other):
        await asyncio.wait_for(instance.close(), 5)


class Arriving(Inline):
    """KV comes as this says."""

    def __init__(self, arrive: Callable[[], Awaitable[Weighed]]) -> None:
        super().__init__(kv_codec("scripted"))
        self._arrive = arrive

    async def unpack(self, parcel: Parcel) -> Weighed:
        del parcel
        return await self._arrive()


def waiting_for_kv(arrive: Callable[[], Awaitable[Weighed]]) -> CallPipe:
    """A pipe that was sent request ``a`` with KV."""
    pipe = CallPipe(Desk(Arriving(arrive), kv_codec("scripted").join))
    rest = Request("a", 3, 20, 0.0, generated=1, computed=3)
    add = Add.pack(rest, Work([1, 2, 3], generated=[4]))
    pipe.put([msgspec.msgpack.encode(add)], 0.0, {"a": [b"x"]})
    return pipe


def cancel(pipe: CallPipe) -> None:
    pipe.put([msgspec.msgpack.encode(Cancel("a", FinishReason.CANCELLED))])


async def test_a_request_that_waits_for_its_kv_can_be_cancelled() -> None:
    async def never() -> Weighed:
        await asyncio.Event().wait()
        raise AssertionError

    pipe = waiting_for_kv(never)
    await asyncio.sleep(0)
    assert pipe.receive() is None
    cancel(pipe)
    # The engine never hears of it, so nobody else can tell the front not to wait for it.
    (event,), _ = await asyncio.wait_for(pipe.take(), 5)
    assert decode(event) == Missed("a", "cancelled")
    assert pipe.receive() is None
    assert pipe._fetching == {}


@pytest.mark.parametrize("broken", [False, True])
async def test_kv_that_comes_as_its_request_is_cancelled_is_let_go(broken: bool) -> None:
    async def stubborn() -> Weighed:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if broken:
            raise ParcelLostError("too late")
        return Weighed(ScriptedKV((1, 2, 3)), 1)

    pipe = waiting_for_kv(stubborn)
    await asyncio.sleep(0)
    (task,) = pipe._fetching.values()
    cancel(pipe)
    await asyncio.wait_for(task, 5)
    (event,), _ = await pipe.take()
    assert decode(event) == Missed("a", "cancelled")
    assert pipe.receive() is None
    assert pipe._desk is not None
    assert pipe._desk.find("a") is None


class Interrupted(dict[str, list[Packed]]):
    """As something is put in, another thread does this, for as long as it is not held up."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self._thread = threading.Thread(target=action)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self._thread.start()
        self._thread.join(0.2)
        return super().setdefault(key, default)


def test_a_part_that_is_left_while_parts_are_collected_is_not_lost() -> None:
    codec = kv_codec("scripted")
    desk = Desk(Inline(codec), codec.join)
    collected: list[dict[str, list[Packed]]] = []

    def collect() -> None:
        # As Ray would pickle it at once.
        collected.append({name: list(parts) for name, parts in desk.collect().items()})

    desk._outgoing = interrupted = Interrupted(collect)
    desk.leave("a", ScriptedKV((1, 2, 3)), last=True)
    interrupted._thread.join()
    assert [[part.last for part in parts["a"]] for parts in collected] == [[True]]


async def test_whatever_keeps_kv_from_arriving_the_front_hears_of_it() -> None:
    async def broken() -> Weighed:
        raise KeyError("x")

    pipe = waiting_for_kv(broken)
    (event,), _ = await pipe.take()
    assert msgspec.msgpack.decode(event, type=Event) == Missed("a", "'x'")
    assert pipe.receive() is None
    assert pipe._fetching == {}


async def test_a_transport_that_does_not_work_here_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(transports, "transport", refuse)
    _, words = await Instance(spec(kv_transport="nixl")).load()
    assert words == "--kv-transport nixl: no such device"


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
    events = list(map(decode, (await pipe.take())[0]))
    while len(events) < MOST_EVENTS + 10:
        events += map(decode, (await pipe.take())[0])
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
