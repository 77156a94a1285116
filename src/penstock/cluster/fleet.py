"""Instances as Ray actors: where they run, and that they run, is Ray's business.

Ray reserves what an instance needs, starts its process, and says when that is gone, be it the
process or the machine.  Then another actor is asked for: a new one, not the old one restarted by
Ray, so that nothing meant for the dead one can reach the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import ray
import structlog
from ray.exceptions import RayError

from penstock.cluster.actor import Instance
from penstock.cluster.parcels import Packed, Parcel
from penstock.server.factories import EngineSpec
from penstock.server.messages import Add, Command, Event, Ready
from penstock.server.supervisor import EngineStartError

_FIRST_BACKOFF = 0.25
_MAX_BACKOFF = 30.0
_HEALTHY_AFTER = 60.0
_STOP_GRACE = 5.0


class Told(Protocol):
    """Who is told what becomes of instances: :class:`penstock.cluster.front.Front`."""

    def instance_ready(self, number: int, ready: Ready) -> None:
        """An instance takes requests."""
        ...

    def instance_left(self, number: int, packed: Mapping[str, Sequence[Packed]]) -> None:
        """KV that an instance leaves for others, by slice, before the news of their ends."""
        ...

    def instance_said(self, number: int, event: Event) -> None:
        """An instance has news."""
        ...

    def instance_lost(self, number: int) -> None:
        """An instance that was ready is gone."""
        ...


class Incarnation:
    """One actor, from its creation to its end."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._waiting: list[bytes] = []
        self._parcels: dict[str, Sequence[Parcel]] = {}
        self._ahead: list[Parcel] = []
        self._wake = asyncio.Event()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode

    async def load(self) -> int:
        """Have the engine loaded; returns the actor's process.

        Raises:
            EngineStartError: it cannot be loaded, with its own words.
            RayError: the actor ended.
        """
        pid, words = await self._actor.load.remote()
        if words:
            raise EngineStartError(words)
        return int(pid)

    def send(self, command: Command, parcels: Sequence[Parcel] = ()) -> None:
        """Have a command sent, in order, together with those that follow at once."""
        self._waiting.append(self._encode(command))
        if parcels and isinstance(command, Add):
            self._parcels[command.id] = parcels
        self._wake.set()

    def send_ahead(self, parcel: Parcel) -> None:
        """Have KV sent whose request will follow."""
        self._ahead.append(parcel)
        self._wake.set()

    async def submit(self) -> None:
        """Send what there is to send, for ever.

        Raises:
            RayError: the actor ended.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            parcels, self._parcels = self._parcels, {}
            ahead, self._ahead = self._ahead, []
            # The answer is awaited: Ray does not promise that calls begin in their order.
            await self._actor.submit.remote(batch, time.monotonic(), parcels, ahead)

    async def events(self) -> tuple[list[Event], Mapping[str, Sequence[Packed]]]:
        """The next events, and KV left behind.

        Raises:
            RayError: the actor ended.
        """
        events, packed = await self._actor.poll.remote()
        return [self._decode(raw) for raw in events], packed

    async def close(self, *, listens: bool) -> None:
        """End the actor, by force if it does not listen (any more)."""
        if listens:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(self._actor.close.remote(), _STOP_GRACE)
        ray.kill(self._actor)


class RayFleet:
    """Keeps so many instances alive; see :class:`penstock.cluster.front.Instances`.

    Args:
        spec: of each instance.
        instances: how many.
        cpus, gpus: what Ray reserves for each.
        told: who is told.
    """

    def __init__(
        self, spec: EngineSpec, instances: int, cpus: float, gpus: float, told: Told
    ) -> None:
        self._specs = [_of_instance(spec, number) for number in range(instances)]
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._told = told
        self._log = structlog.get_logger("penstock.cluster")
        self._live: dict[int, Incarnation] = {}
        self._any_started = False
        self._node = ray.get_runtime_context().get_node_id()

    def send(self, number: int, command: Command, parcels: Sequence[Parcel] = ()) -> None:
        """Hand a command to an instance that is ready; a dead one ignores it."""
        self._live[number].send(command, parcels)

    def send_ahead(self, number: int, parcel: Parcel) -> None:
        """Have an instance fetch KV whose request will follow."""
        # What travels in messages would travel twice.
        if self._specs[number].kv_transport != "inline":
            self._live[number].send_ahead(parcel)

    async def run(self) -> None:
        """Keep them alive until cancelled.

        Raises:
            EngineStartError: an instance could not start, and none had before.
            RuntimeError: Ray on this machine has ended.
        """
        tasks = [asyncio.create_task(self._keep(number)) for number in range(len(self._specs))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                if not task.cancelling():  # a second time would cut short what the first began
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            ray.shutdown()

    async def _keep(self, number: int) -> None:
        """Run one incarnation of an instance after another."""
        backoff = _FIRST_BACKOFF
        while True:
            began = time.monotonic()
            why = await self._run_once(number)
            if time.monotonic() - began > _HEALTHY_AFTER:
                backoff = _FIRST_BACKOFF
            self._log.error("instance_died", instance=number, why=why, restart_in_s=backoff)
            await asyncio.to_thread(self._check_ray)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _MAX_BACKOFF)

    def _check_ray(self) -> None:
        """Without Ray on this machine nothing will be started any more, and nobody would say so."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if self._node not in alive:
            msg = "Ray on this machine has ended; no instance can be started"
            raise RuntimeError(msg)

    async def _run_once(self, number: int) -> str:
        """From an actor's creation to its end; returns why it ended."""
        make = ray.remote(Instance).options(scheduling_strategy="SPREAD", **self._resources)
        incarnation = Incarnation(make.remote(msgspec.json.encode(self._specs[number])))
        try:
            return await self._live_with(number, incarnation)
        finally:
            ready = self._live.pop(number, None) is not None
            await asyncio.shield(incarnation.close(listens=ready))

    async def _live_with(self, number: int, incarnation: Incarnation) -> str:
        try:
            pid = await incarnation.load()
        except (EngineStartError, RayError) as error:
            if self._any_started:
                return _first_line(error)
            msg = f"instance {number} could not start: {_first_line(error)}"
            raise EngineStartError(msg) from None
        self._any_started = True
        both = [
            asyncio.create_task(incarnation.submit()),
            asyncio.create_task(self._listen(number, incarnation, pid)),
        ]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            await done.pop()  # neither ends but by an error
        except RayError as error:
            if number in self._live:
                self._told.instance_lost(number)
            return _first_line(error)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        return ""

    async def _listen(self, number: int, incarnation: Incarnation, pid: int) -> None:
        while True:
            events, packed = await incarnation.events()
            if packed:
                self._told.instance_left(number, packed)
            for event in events:
                self._on_event(number, incarnation, pid, event)

    def _on_event(self, number: int, incarnation: Incarnation, pid: int, event: Event) -> None:
        if not isinstance(event, Ready):
            self._told.instance_said(number, event)
            return
        self._live[number] = incarnation
        # Where memory was measured, the next one must have as much: requests rely on it.
        spec = self._specs[number]
        options = {**spec.options, "kv_tokens": event.kv_tokens}
        self._specs[number] = msgspec.structs.replace(spec, options=options)
        self._log.info("instance_ready", instance=number, pid=pid, kv_tokens=event.kv_tokens)
        self._told.instance_ready(number, event)


def _of_instance(spec: EngineSpec, number: int) -> EngineSpec:
    """An instance's own: steps are recorded in a file for each."""
    if not spec.record_steps:
        return spec
    return msgspec.structs.replace(spec, record_steps=f"{spec.record_steps}.{number}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
