"""A socket, logs, and uvicorn: what every server of ours begins with."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from penstock.config import ConfigError
from penstock.server.limits import limited_protocol

# Longer than clients keep idle connections, so that it is they who close them: a request that
# meets a connection which the server is closing fails for no good reason.
_KEEP_ALIVE = 30


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything expensive is loaded.

    Raises:
        ConfigError: the address is in use, or is none of this machine's.
    """
    sock = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen()  # with SO_REUSEADDR another server may hold the port until one listens
    except OSError as error:
        if sock is not None:
            sock.close()
        msg = f"--host {host} --port {port}: cannot listen there: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            msg = f"--port {port} is in use on {host}; choose another port, or 0 for a free one"
        raise ConfigError(msg) from None
    return sock


def configure_logs() -> None:
    """JSON lines on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)


class HttpServer(uvicorn.Server):
    """uvicorn for an application whose owner handles the signals.

    Args:
        app: serves no lifespan.
        max_header_bytes: longest head of a request.

    Attributes:
        listening: set once connections are taken.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        settings = uvicorn.Config(
            app,
            http=limited_protocol(max_header_bytes),
            lifespan="off",
            log_config=None,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=1,
        )
        super().__init__(settings)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone: their owner drains first."""
        yield
