"""Instances without processes: the real engine loop over the scripted engine, turned by hand."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from penstock.cluster.front import Front
from penstock.cluster.parcels import Desk, Inline, Parcel
from penstock.core.engine import Work
from penstock.core.policies import presets
from penstock.core.policies.fleets import Fleet, build_fleet
from penstock.core.runtime import Runtime
from penstock.core.sampling import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, FinishReason, Request, Role
from penstock.server.engine_loop import EngineLoop, StepPrices
from penstock.server.factories import kv_codec
from penstock.server.messages import (
    NOTHING_SWAPPED,
    Add,
    Brought,
    Command,
    End,
    Event,
    Explained,
    Gauges,
    Missed,
    Ready,
    Refused,
    Step,
)
from penstock.sim.recording import RecordingEngine
from penstock.testing import ScriptedEngine

CAPABILITIES = Capabilities(64, 4, 8, 32, 200, prefix_cache=True)


class HandPipe:
    """Both ends in one place."""

    def __init__(self) -> None:
        self.commands: deque[Command] = deque()
        self.events: deque[Event] = deque()

    def receive(self) -> Command | None:
        return self.commands.popleft() if self.commands else None

    def wait(self, seconds: float) -> None:
        raise AssertionError(seconds)

    def send(self, event: Event) -> None:
        self.events.append(event)


class HandInstance:
    """One instance; it does something when it is turned."""

    def __init__(self, preset: str = "past-future", **parameters: float) -> None:
        self.pipe = HandPipe()
        self.engine = ScriptedEngine(CAPABILITIES)
        self.prices = StepPrices()
        scheduler = Scheduler(CAPABILITIES, presets.build(preset, **parameters))
        recorded = RecordingEngine(self.engine, self.prices.observe)
        self.runtime = Runtime(scheduler, recorded, time.monotonic)
        codec = kv_codec("scripted")
        self.desk = Desk(Inline(codec), codec.join)
        self.loop = EngineLoop(self.runtime, self.pipe, self.prices, self.desk)

    def deliver(self, name: str, parcels: Sequence[Parcel]) -> None:
        """What the actor does with KV that comes with a request."""
        for _ in self.desk.deliver(name, parcels).__await__():
            raise AssertionError


class Client:
    """What clients were told, by request: a listener and an observer in one."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, End] = {}
        self.refused: dict[str, Refused] = {}
        self.explained: dict[int, str] = {}
        self.ready: Ready | None = None
        self.gauges: Gauges | None = None
        self.swapped = NOTHING_SWAPPED
        self.lost: list[tuple[int, int]] = []
        self.hand_offs: list[int] = []
        self.instances: dict[int, tuple[Gauges, float]] = {}

    def on_ready(self, ready: Ready) -> None:
        self.ready = ready

    def on_death(self, status: int) -> None:
        raise AssertionError(status)

    def on_event(self, event: Event) -> None:
        match event:
            case Step():
                self.gauges, self.swapped = event.gauges, event.swapped
                for name, token in event.tokens.items():
                    assert name not in self.ends
                    self.tokens.setdefault(name, []).append(token)
                for end in event.ended:
                    assert end.id not in self.ends
                    assert end.output_tokens == len(self.tokens.get(end.id, []))
                    self.ends[end.id] = end
            case Refused():
                self.refused[event.id] = event
            case Explained():
                self.explained[event.ticket] = event.text

    def on_instance(self, number: int, gauges: Gauges, load: float) -> None:
        self.instances[number] = (gauges, load)

    def on_hand_off(self, size: int, seconds: float) -> None:
        assert seconds >= 0
        self.hand_offs.append(size)

    def on_instance_lost(self, number: int, *, left: int) -> None:
        self.lost.append((number, left))


class Hall:
    """A front, and instances that come, work and die as the test says."""

    def __init__(
        self,
        preset: str = "past-future",
        place: str | None = None,
        roles: Sequence[Role] = (),
        *,
        stream_kv: bool = False,
        **given: float,
    ) -> None:
        self.fleet: Fleet = build_fleet(preset, place=place, parameters=given)
        self.client = Client()
        self.front = Front(
            self.fleet.dispatch, self.client, self.client, roles, stream_kv=stream_kv
        )
        self.front.attach(self)
        self.live: dict[int, HandInstance] = {}
        self.loses_kv = 0
        self.sent: list[tuple[int, Command]] = []
        self.ahead: list[tuple[int, Parcel]] = []
        self.parts: dict[str, int] = {}

    async def run(self) -> None:
        raise AssertionError

    def send_ahead(self, number: int, parcel: Parcel) -> None:
        assert number in self.live
        self.ahead.append((number, parcel))

    def send(self, number: int, command: Command, parcels: Sequence[Parcel] = ()) -> None:
        self.sent.append((number, command))
        instance = self.live[number]
        if isinstance(command, Add) and parcels:
            self.parts[command.id] = len(parcels)
            if self.loses_kv:
                self.loses_kv -= 1
                instance.pipe.events.append(Missed(command.id, "its sender died"))
                return
            instance.deliver(command.id, parcels)
            instance.pipe.events.append(Brought(command.id, sum(map(len, parcels))))
        instance.pipe.commands.append(command)

    def start(self, number: int) -> HandInstance:
        instance = HandInstance(self.fleet.preset, **self.fleet.parameters)
        self.live[number] = instance
        self.front.instance_ready(number, instance.loop.ready)
        return instance

    def kill(self, number: int) -> HandInstance:
        instance = self.live.pop(number)
        self.front.instance_lost(number)
        return instance

    def turn(self, number: int) -> bool:
        """One step of an instance, and its news to the front."""
        instance = self.live[number]
        worked = instance.loop.turn()
        packed = instance.desk.collect()
        if packed:
            self.front.instance_left(number, packed)
        while instance.pipe.events:
            self.front.instance_said(number, instance.pipe.events.popleft())
        return worked

    def adds(self) -> list[tuple[int, Add]]:
        return [(number, add) for number, add in self.sent if isinstance(add, Add)]

    def ask(
        self,
        name: str,
        cap: int = 30,
        prompt: Sequence[int] = (1, 2, 3),
        sampling: SamplingParams | None = None,
        trace: int | None = None,
    ) -> Work:
        work = Work(list(prompt), sampling or SamplingParams(temperature=0), trace)
        request = Request(name, len(prompt), cap, time.monotonic())
        self.front.send(Add.pack(request, work))
        return work

    def check_all(self, works: dict[str, tuple[Work, int]]) -> None:
        """Every request ended well, with the text that it must have."""
        engine = ScriptedEngine(CAPABILITIES)
        for name, (work, cap) in works.items():
            assert self.client.tokens[name] == engine.expected_text(work, cap), name
            assert self.client.ends[name].reason in (FinishReason.STOP, FinishReason.LENGTH)
        for instance in self.live.values():
            assert instance.engine.open_requests == 0
            assert instance.runtime.stats().kv_used == 0
        self.front._dispatcher.check()
        assert self.front._dispatcher.open_requests == 0
        assert self.front._stories == {}
