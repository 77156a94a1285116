"""An instance as a Ray actor: the engine and its scheduler, turned by a thread of their own.

Messages are those of :mod:`penstock.server.messages`, encoded.  Commands come in with
:meth:`Instance.submit`; events wait until the front asks with :meth:`Instance.poll`, which brings
all there are, so that the cost of a call does not grow with the steps.  If the thread fails, the
process ends: Ray says so to the front, which has another one started.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from penstock.cluster.parcels import Desk, Packed, Parcel, ParcelLostError, first_line
from penstock.server.engine_loop import build_loop, spin_briefly
from penstock.server.factories import EngineSpec, kv_codec
from penstock.server.messages import Add, Brought, Cancel, Command, Event, Missed, Stop

_NONE: Mapping[str, Sequence[Parcel]] = MappingProxyType({})
MOST_EVENTS = 1024
"""Events that wait for the front; with as many the engine waits too."""


class CallPipe:
    """Between the engine's thread and the event loop that answers calls.

    See :class:`penstock.server.engine_loop.Pipe`.
    """

    def __init__(self, desk: Desk | None = None) -> None:
        self._desk = desk
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._ahead: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._commands: deque[Command] = deque()
        self._events: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Command).decode

    # -- the engine's thread ---------------------------------------------------------------

    def receive(self) -> Command | None:
        """The next command, if there is one."""
        try:
            return self._commands.popleft()
        except IndexError:
            return None

    def wait(self, seconds: float) -> None:
        """Until there is a command, but no longer than this."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands, seconds)

    def send(self, event: Event) -> None:
        """Hand an event over; waits while the front is far behind."""
        raw = self._encode(event)
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < MOST_EVENTS)
            self._events.append(raw)
        self._loop.call_soon_threadsafe(self._news.set)

    # -- the event loop --------------------------------------------------------------------

    def put(
        self, raw: list[bytes], late: float = 0.0, parcels: Mapping[str, Sequence[Parcel]] = _NONE
    ) -> None:
        """Pass commands on; those that bring KV once that is there.

        Args:
            late: added to the times of requests, which are by another machine's clock.
            parcels: KV that some of them bring, by their ids.
        """
        commands = [self._decode(one) for one in raw]
        with self._changed:
            for command in commands:
                match command:
                    case Add():
                        add = _on_time(command, late)
                        if command.id in parcels:
                            task = self._loop.create_task(self._fetch(add, parcels[command.id]))
                            self._fetching[command.id] = task
                        else:
                            self._commands.append(add)
                    case Cancel() if command.id in self._fetching:
                        self._fetching.pop(command.id).cancel()
                        # The engine never counts it as received, and the front would wait for that.
                        self._events.append(self._encode(Missed(command.id, "cancelled")))
                        self._news.set()
                    case _:
                        self._commands.append(command)
            self._changed.notify()

    def fetch(self, parcels: Sequence[Parcel]) -> None:
        """Parts of KV whose request will follow."""
        for parcel in parcels:
            assert self._desk is not None
            task = self._loop.create_task(self._desk.fetch(parcel))
            self._ahead.add(task)
            task.add_done_callback(self._ahead.discard)

    async def _fetch(self, add: Add, parcels: Sequence[Parcel]) -> None:
        """Take a request in with the KV that it brings."""
        assert self._desk is not None
        event: Event
        try:
            size = await self._desk.deliver(add.id, parcels)
            event = Brought(add.id, size)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request must go on
            if not isinstance(error, ParcelLostError | ValueError):
                traceback.print_exc()
            event = Missed(add.id, first_line(error))
        if self._fetching.pop(add.id, None) is None:
            # Cancelled as it came, which the transport did not notice; the front has been told.
            self._desk.find(add.id)
            return
        with self._changed:
            if isinstance(event, Brought):
                self._commands.append(add)
            self._events.append(self._encode(event))
            self._changed.notify()
        self._news.set()

    async def take(self) -> tuple[list[bytes], dict[str, list[Packed]]]:
        """All events there are, once there are any, and KV that requests left meanwhile."""
        await self._news.wait()
        self._news.clear()
        with self._changed:
            events = list(self._events)
            self._events.clear()
            # Left before its event was handed over, so it is never later than that.
            packed = self._desk.collect() if self._desk is not None else {}
            self._changed.notify()
        return events, packed


class Instance:
    """The actor.

    Args:
        spec: an :class:`~penstock.server.factories.EngineSpec` as JSON.
    """

    def __init__(self, spec: bytes) -> None:
        self._spec = msgspec.json.decode(spec, type=EngineSpec)
        self._pipe: CallPipe | None = None
        self._thread: threading.Thread | None = None

    async def load(self) -> tuple[int, str]:
        """Load the engine and begin.

        Returns:
            the process, and what keeps the engine from loading, in words; empty if nothing does.
        """
        loop = asyncio.get_running_loop()
        desk = None
        if self._spec.kv_transport:
            from penstock.cluster.transports import transport

            name, codec = self._spec.kv_transport, kv_codec(self._spec.kind)
            device = str(self._spec.options.get("device", "auto"))
            try:
                desk = Desk(transport(name, codec, device), codec.join)
            except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it
                traceback.print_exc()
                return os.getpid(), f"--kv-transport {name}: {first_line(error)}"
        self._pipe = CallPipe(desk)
        loaded: asyncio.Future[str] = loop.create_future()

        def tell(words: str) -> None:
            loop.call_soon_threadsafe(loaded.set_result, words)

        # One thread loads and turns: how many threads OpenMP may use is said per thread.
        target, args = _turn, (self._spec, self._pipe, desk, tell)
        self._thread = threading.Thread(target=target, args=args, name="engine", daemon=True)
        self._thread.start()
        return os.getpid(), await loaded

    async def submit(
        self,
        commands: list[bytes],
        sent_at: float,
        parcels: Mapping[str, Sequence[Parcel]],
        ahead: Sequence[Parcel],
    ) -> None:
        """Take encoded commands, sent at this time by the front's monotonic clock.

        Clocks of two machines have nothing in common, so requests arrived as long before
        this call as they had before it was made.

        Args:
            parcels: KV that some of them bring, in parts.
            ahead: parts of KV whose requests will follow.
        """
        assert self._pipe is not None
        self._pipe.fetch(ahead)
        self._pipe.put(commands, time.monotonic() - sent_at, parcels)

    async def poll(self) -> tuple[list[bytes], dict[str, list[Packed]]]:
        """Encoded events since the last call, once there are any, and KV left behind."""
        assert self._pipe is not None
        return await self._pipe.take()

    async def close(self) -> None:
        """End the engine and wait until it has given everything back."""
        if self._pipe is not None and self._thread is not None:
            self._pipe.put([msgspec.msgpack.encode(Stop())])
            await asyncio.to_thread(self._thread.join)


def _on_time(add: Add, late: float) -> Add:
    """With its times by this machine's clock."""
    first = None if add.first_token is None else add.first_token + late
    return msgspec.structs.replace(add, arrival=add.arrival + late, first_token=first)


def _turn(spec: EngineSpec, pipe: CallPipe, desk: Desk | None, tell: Callable[[str], None]) -> None:
    spin_briefly()
    try:
        loop = build_loop(spec, pipe, desk)
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it
        if not isinstance(error, ValueError | OSError):  # those say what to change, in words
            traceback.print_exc()
        tell(str(error) or type(error).__name__)
        return
    # Models are full of objects that stay; the collector would look at them again and again.
    gc.collect()
    gc.freeze()
    tell("")
    try:
        loop.run()
        loop.close()
    except BaseException:  # noqa: BLE001 - nothing turns the engine any more
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
