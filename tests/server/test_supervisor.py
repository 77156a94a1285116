"""What is sent to an engine process that is dead or dying."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq.asyncio

from penstock.server import supervisor
from penstock.server.factories import EngineSpec
from penstock.server.messages import Event, Ready, Stop
from penstock.server.supervisor import Incarnation, Supervisor


async def test_a_command_that_nobody_reads_is_dropped(tmp_path: Path) -> None:
    """The process's end is noticed after its socket's."""
    context = zmq.asyncio.Context()
    incarnation = Incarnation(context, tmp_path, 0)
    incarnation._commands.bind(f"ipc://{tmp_path}/commands")
    try:
        incarnation.send(Stop())
    finally:
        await incarnation.close(listens=False)
        context.destroy(linger=0)


class Dying:
    """An incarnation that is ready, and dies as soon as it is asked to."""

    die: asyncio.Event
    closing: asyncio.Event

    def __init__(self, context: zmq.asyncio.Context, directory: Path, number: int) -> None:
        del context, directory
        self.pid = number

    async def start(self, spec: EngineSpec) -> None:
        """Nothing to launch."""

    async def listen(self, tell: Callable[[Event], None]) -> int:
        tell(Ready(10, 16, 8, 64, 100))
        await self.die.wait()
        return 9

    async def close(self, *, listens: bool) -> None:
        assert listens
        self.closing.set()
        await asyncio.sleep(0.05)


class Listener:
    def __init__(self) -> None:
        self.ready, self.dead = asyncio.Event(), asyncio.Event()
        self.status: int | None = None

    def on_ready(self, ready: Ready) -> None:
        assert ready.kv_tokens
        self.ready.set()

    def on_event(self, event: Event) -> None:
        raise AssertionError(event)

    def on_death(self, status: int) -> None:
        self.status = status
        self.dead.set()


async def test_a_dead_process_is_not_ready_while_it_is_cleared_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Dying.die, Dying.closing = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(supervisor, "Incarnation", Dying)
    listener = Listener()
    spec = EngineSpec(
        kind="scripted", model="", options={}, vocab_size=9, preset="vllm", order=None,
        parameters={}, seed=0,
    )  # fmt: skip
    watched = Supervisor(spec, listener)
    running = asyncio.ensure_future(watched.run())
    await listener.ready.wait()
    assert watched.ready
    Dying.die.set()
    await Dying.closing.wait()
    assert not watched.ready
    with pytest.raises(RuntimeError, match="not running"):
        watched.send(Stop())
    await listener.dead.wait()
    assert listener.status == 9
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
