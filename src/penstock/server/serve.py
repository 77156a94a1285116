"""From a configuration to a running server, and from SIGTERM to a clean exit."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import structlog
import uvloop

from penstock.core.gate import Limits
from penstock.core.policies import presets
from penstock.server.app import build_app
from penstock.server.backend import build_backend, instance_preset
from penstock.server.client import EngineClient
from penstock.server.listen import HttpServer, configure_logs
from penstock.server.messages import Event, Ready
from penstock.server.metrics import Metrics
from penstock.server.service import Service, shutting_down
from penstock.server.supervisor import EngineStartError
from penstock.settings import Config
from penstock.text.tokenizer import TextTokenizer

_LAST_WORDS = 1.0  # for errors to reach their clients


def serve_until_stopped(
    config: Config, path: Path, text: TextTokenizer, sock: socket.socket
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Args:
        path: the model's folder.
        text: its tokenizer.
        sock: a bound socket, see :func:`penstock.server.listen.bind`.
    """
    configure_logs()
    signal.signal(signal.SIGTERM, _leave)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Server(config, path, text, sock).run())
    except SystemExit as left:
        if left.code != signal.SIGTERM:
            raise
        return 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Before the event loop takes signals; Ray does the same while it starts."""
    del frame
    sys.exit(number)


class _Server:
    def __init__(
        self, config: Config, path: Path, text: TextTokenizer, sock: socket.socket
    ) -> None:
        self._config = config
        self._sock = sock
        self._log = structlog.get_logger("penstock")
        given = Path(config.engine.model)
        model = given.resolve().name if given.is_dir() else config.engine.model
        self._metrics = Metrics(model)
        limits = Limits(config.admission.max_waiting, config.admission.max_waiting_tokens)
        self._client = EngineClient(limits, self._metrics, paced=config.http.pace_delivery)
        self._backend = build_backend(config, path, text, self, self._metrics)
        signal.signal(signal.SIGTERM, _leave)  # Ray, once it runs, would abort the process
        self._client.attach(self._backend)
        preset = presets.PRESETS[instance_preset(config)]
        self._service = Service(
            config,
            model,
            text,
            self._client,
            self._metrics,
            started=time.time(),
            priorities=(config.scheduler.order or preset.order) == "priority",
        )
        self._http = HttpServer(build_app(self._service), config.http.max_header_bytes)
        self._asked_to_stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._sock.setblocking(False)
        http = asyncio.create_task(self._http.serve(sockets=[self._sock]))
        engine = asyncio.create_task(self._backend.run())
        asked = asyncio.create_task(self._asked_to_stop.wait())
        status = 0
        try:
            await asyncio.wait({http, engine, asked}, return_when=asyncio.FIRST_COMPLETED)
            if engine.done():
                status = self._report_engine_failure(engine)
            elif http.done():
                self._log.error("http_failed", exc_info=http.exception())
                status = 1
            else:
                await self._drain()
        finally:
            self._http.should_exit = True
            await asyncio.gather(http, return_exceptions=True)
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            asked.cancel()
        return status

    def _on_signal(self) -> None:
        if self._service.draining:
            self._log.warning("second_signal", effect="open requests are ended now")
            self._end_all()
        self._service.draining = True
        self._asked_to_stop.set()

    async def _drain(self) -> None:
        grace = self._config.http.drain_seconds
        self._log.info("draining", open=self._client.open_requests, grace_s=grace)
        await self._idle_within(grace)
        self._end_all()
        await self._idle_within(_LAST_WORDS)

    async def _idle_within(self, seconds: float) -> None:
        if self._service.busy:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._service.idle.wait(), seconds)

    def _end_all(self) -> None:
        self._service.give_up_coming()
        self._client.fail_all(shutting_down())

    def _report_engine_failure(self, engine: asyncio.Task[None]) -> int:
        error = engine.exception()
        if isinstance(error, EngineStartError):
            sys.stderr.write(f"penstock: {error}\n")
        else:
            self._log.error("supervisor_failed", exc_info=error)
        return 1

    # -- what the supervisor says ----------------------------------------------------------

    def on_ready(self, ready: Ready) -> None:
        """An engine process is loaded."""
        first = self._client.ready is None
        self._client.on_ready(ready)
        self._metrics.on_ready()
        if first:
            host, port = self._sock.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            sys.stdout.write(
                f"penstock: serving {self._service.model} at http://{shown}:{port}"
                f" (preset {self._config.scheduler.preset}, {self._size(ready)} KV tokens)\n"
            )
            sys.stdout.flush()

    def _size(self, ready: Ready) -> str:
        instances = self._config.cluster.count
        return (
            f"{instances} instances of {ready.kv_tokens}" if instances > 1 else f"{ready.kv_tokens}"
        )

    def on_event(self, event: Event) -> None:
        """The engine process said something."""
        self._client.on_event(event)

    def on_death(self, status: int) -> None:
        """The engine process ended by itself."""
        self._client.on_death(status)
        self._metrics.on_death()
