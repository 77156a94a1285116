"""From flags to a running router, and from SIGTERM to a clean exit."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import structlog
import uvloop

from penstock.config import ConfigError
from penstock.router.app import LIMITS, build_app
from penstock.router.backend import Backend, open_session
from penstock.router.circuit import Circuit
from penstock.router.failures import BackendError, Kind
from penstock.router.metrics import Metrics
from penstock.router.pool import Pool
from penstock.router.service import Service
from penstock.router.settings import Settings
from penstock.server.listen import HttpServer, configure_logs

_LAST_WORDS = 1.0  # for errors to reach their clients


def route_until_stopped(settings: Settings, sock: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Args:
        sock: a bound socket, see :func:`penstock.server.listen.bind`.

    Raises:
        ConfigError: a backend cannot be used; it names the flag.
    """
    configure_logs()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, sock))


async def _run(settings: Settings, sock: socket.socket) -> int:
    async with open_session(settings.gap_timeout) as session:
        backends = make_backends(settings, session)
        models = await inspect(backends, settings.max_wait)
        pool = Pool(settings, backends, Metrics(), time.monotonic, models[0]["id"])
        try:
            return await _Router(Service(settings, pool, models), sock).run()
        finally:
            await pool.close()


def make_backends(settings: Settings, session: aiohttp.ClientSession) -> list[Backend]:
    """The backends that the flags name, circuits closed, not looked at yet."""
    return [
        Backend(
            number,
            url,
            session,
            Circuit(settings.failures, settings.backoff, settings.max_backoff, time.monotonic),
            settings.api_key,
        )
        for number, url in enumerate(settings.backend)
    ]


async def inspect(backends: Sequence[Backend], patience: float) -> list[dict[str, Any]]:
    """See that every backend works and serves the same; returns the models.

    Args:
        patience: seconds that a busy backend is waited for.

    Raises:
        ConfigError: one cannot be used.
    """
    served = await asyncio.gather(*(_models(backend) for backend in backends))
    names = [sorted(model["id"] for model in models) for models in served]
    for backend, mine in zip(backends, names, strict=True):
        if mine != names[0]:
            msg = f"--backend {backend.url} serves {', '.join(mine)}, but --backend"
            other = f"{backends[0].url} serves {', '.join(names[0])}; all must serve the same"
            raise ConfigError(f"{msg} {other}")
    model = served[0][0]["id"]
    await asyncio.gather(*(_probe(backend, model, patience) for backend in backends))
    return served[0]


async def _models(backend: Backend) -> list[dict[str, Any]]:
    try:
        return await backend.models()
    except BackendError as error:
        raise ConfigError(f"--backend {backend.url} cannot be used: {error}") from None


async def _probe(backend: Backend, model: str, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            await backend.probe(model)
        except BackendError as error:
            wait = error.retry_after or 1.0
            if error.kind is Kind.BUSY and time.monotonic() + wait < until:
                await asyncio.sleep(wait)
                continue
            raise ConfigError(f"--backend {backend.url} cannot be used: {error}") from None
        return


class _Router:
    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self._sock = sock
        self._log = structlog.get_logger("penstock")
        self._http = HttpServer(build_app(service), LIMITS.max_header_bytes)
        self._asked_to_stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._sock.setblocking(False)
        http = asyncio.create_task(self._http.serve(sockets=[self._sock]))
        listening = asyncio.create_task(self._http.listening.wait())
        asked = asyncio.create_task(self._asked_to_stop.wait())
        try:
            await asyncio.wait({http, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not http.done():
                self._announce()
                await asyncio.wait({http, asked}, return_when=asyncio.FIRST_COMPLETED)
            if http.done():
                return self._report_http_failure(http)
            await self._drain()
        finally:
            self._http.should_exit = True
            await asyncio.gather(http, return_exceptions=True)
            listening.cancel()
            asked.cancel()
        return 0

    def _report_http_failure(self, http: asyncio.Task[None]) -> int:
        error, settings = http.exception(), self._service.settings
        self._log.error("http_failed", exc_info=error)
        where = f"--host {settings.host} --port {settings.port}"
        why = error or "its server ended by itself"
        sys.stderr.write(f"penstock: {where}: HTTP cannot be served there: {why}\n")
        return 1

    def _announce(self) -> None:
        host, port = self._sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        settings = self._service.settings
        slices = f"slices of {settings.slice_tokens} tokens" if settings.slice_tokens else "whole"
        sys.stdout.write(
            f"penstock: routing {', '.join(self._service.names)} at http://{shown}:{port}"
            f" ({len(settings.backend)} backends, {slices}, {settings.place})\n"
        )
        sys.stdout.flush()

    def _on_signal(self) -> None:
        if self._service.draining:
            self._log.warning("second_signal", effect="open requests are ended now")
            self._hurry.set()
        self._service.draining = True
        self._asked_to_stop.set()

    async def _drain(self) -> None:
        grace = self._service.settings.drain_seconds
        self._log.info("draining", open=self._service.open, grace_s=grace)
        idle = asyncio.create_task(self._idle())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({idle, hurry}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        self._service.pool.end_all()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(idle, _LAST_WORDS)

    async def _idle(self) -> None:
        if self._service.open:
            await self._service.idle.wait()
