"""Keeps an engine process alive, and tells the rest what becomes of it.

One :class:`Incarnation` is one run of the process, with sockets of its own, so
that nothing of a dead one can reach the next.  When a process ends by itself
the supervisor says so at once, waits (longer each time it fails soon), and
starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
import zmq
import zmq.asyncio

from penstock.server.factories import EngineSpec
from penstock.server.messages import Command, Event, Ready, Stop

_FIRST_BACKOFF = 0.25
_MAX_BACKOFF = 30.0
_HEALTHY_AFTER = 60.0
_STOP_GRACE = 5.0


class EngineStartError(Exception):
    """The first engine process could not start; its own words are on standard error."""


class Listener(Protocol):
    """Who is told what happens to the engine process."""

    def on_ready(self, ready: Ready) -> None:
        """A process is loaded and takes requests."""
        ...

    def on_event(self, event: Event) -> None:
        """The process said something."""
        ...

    def on_death(self, status: int) -> None:
        """The process ended without being asked to."""
        ...


class Backend(Protocol):
    """Where requests go: one engine process, or a front of several instances."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        ...

    def send(self, command: Command) -> None:
        """Hand a command over.

        Raises:
            RuntimeError: it is not ready.
        """
        ...

    async def run(self) -> None:
        """Keep it alive until cancelled.

        Raises:
            EngineStartError: it could not start.
        """
        ...


class Incarnation:
    """One run of the engine process."""

    def __init__(self, context: zmq.asyncio.Context, directory: Path, number: int) -> None:
        self._paths = [directory / f"{kind}-{number}" for kind in ("commands", "events")]
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode
        # A plain socket to send: with no high-water mark it cannot block, and needs no futures.
        self._commands: zmq.Socket[bytes] = zmq.Socket(context, zmq.PUSH)
        self._events: zmq.asyncio.Socket = context.socket(zmq.PULL)
        # Commands are bounded by admission; a full pipe must never block or lose a cancellation.
        self._commands.sndhwm = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process, once started."""
        return self._process.pid if self._process else None

    async def start(self, spec: EngineSpec) -> None:
        """Launch the process; it says :class:`Ready` when it is loaded."""
        commands, events = (f"ipc://{path}" for path in self._paths)
        self._commands.bind(commands)
        self._events.bind(events)
        spec = msgspec.structs.replace(spec, commands=commands, events=events)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "penstock.server.engine_process",
            stdin=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
            await self._process.stdin.drain()

    def send(self, command: Command) -> None:
        """Hand a command over; a dead process ignores it."""
        # A peer that is gone is noticed here before its process's end is.
        with contextlib.suppress(zmq.Again):
            self._commands.send(self._encode(command), zmq.NOBLOCK)

    async def listen(self, tell: Callable[[Event], None]) -> int:
        """Pass events on until the process ends; returns its exit status."""
        assert self._process is not None
        reader = asyncio.ensure_future(self._read(tell))
        waiter = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({reader, waiter}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                await reader  # raises what ended it
            return await waiter
        finally:
            reader.cancel()
            waiter.cancel()

    async def _read(self, tell: Callable[[Event], None]) -> None:
        while True:
            raw = await self._events.recv()
            tell(self._decode(raw))
            # recv does not yield when a message is there already: let the responses be written.
            await asyncio.sleep(0)

    async def close(self, *, listens: bool) -> None:
        """End the process, by force if it does not listen (yet), and remove the sockets."""
        if self._process is not None and self._process.returncode is None:
            if listens:
                self.send(Stop())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _STOP_GRACE)
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        self._commands.close(linger=0)
        self._events.close(linger=0)
        for path in self._paths:
            path.unlink(missing_ok=True)


class Supervisor:
    """Runs one incarnation after another until closed."""

    def __init__(self, spec: EngineSpec, listener: Listener) -> None:
        self._spec = spec
        self._listener = listener
        self._log = structlog.get_logger("penstock.engine")
        self._directory = tempfile.TemporaryDirectory(prefix="penstock-")  # mode 0700
        self._context = zmq.asyncio.Context()
        self._current: Incarnation | None = None
        self._ready = False
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether a process is loaded and alive."""
        return self._ready

    @property
    def pid(self) -> int | None:
        """The current process."""
        return self._current.pid if self._current else None

    def send(self, command: Command) -> None:
        """Send to the current process.

        Raises:
            RuntimeError: there is none that is ready.
        """
        if self._current is None or not self._ready:
            msg = "the engine process is not running"
            raise RuntimeError(msg)
        self._current.send(command)

    async def run(self) -> None:
        """Supervise until cancelled.

        Raises:
            EngineStartError: the very first process ended before it was ready.
        """
        backoff = _FIRST_BACKOFF
        started_once = False
        try:
            while True:
                began = time.monotonic()
                status, was_ready = await self._run_once()
                started_once |= was_ready
                if not started_once:
                    msg = f"the engine process ended with status {status} before it was ready"
                    raise EngineStartError(msg)
                if was_ready:
                    self._listener.on_death(status)
                if time.monotonic() - began > _HEALTHY_AFTER:
                    backoff = _FIRST_BACKOFF
                self._log.error("engine_died", status=status, restart_in_s=backoff)
                self.restarts += 1
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF)
        finally:
            self._ready = False
            self._context.destroy(linger=0)
            self._directory.cleanup()

    async def _run_once(self) -> tuple[int, bool]:
        """One process, to its end; returns its exit status, and whether it had been ready."""
        incarnation = Incarnation(self._context, Path(self._directory.name), self.restarts)
        self._current = incarnation
        was_ready = False
        try:
            await incarnation.start(self._spec)
            status = await incarnation.listen(self._on_event)
        finally:
            # Before anything is awaited: whoever asks meanwhile is told that there is none.
            was_ready, self._ready = self._ready, False
            self._current = None
            await asyncio.shield(incarnation.close(listens=was_ready))
        return status, was_ready

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._ready = True
            self._log.info("engine_ready", pid=self.pid, kv_tokens=event.kv_tokens)
            self._listener.on_ready(event)
        else:
            self._listener.on_event(event)
