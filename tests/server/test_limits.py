"""Heads and trailers that do not end, and what must not be taken for one."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from penstock.server.limits import limited_protocol

LIMIT = 1000
CHUNKED = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\nx-slo-class: own\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Connection:
    """A client's connection to an application that reads bodies and answers 204."""

    def __init__(self) -> None:
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.bodies: list[int] = []
        self.transport = Transport()
        config = uvicorn.Config(self._app, interface="asgi3", log_config=None, ws="none")
        make = cast("Any", limited_protocol(LIMIT))
        self.protocol = make(config=config, server_state=ServerState(), app_state={})
        self.protocol.connection_made(self.transport)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers.append(list(scope["headers"]))
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        self.bodies.append(size)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(self, *reads: bytes) -> None:
        """Each is what one read of the socket brings."""
        for read in reads:
            if self.transport.closed:
                return
            self.protocol.data_received(read)
            for _ in range(4):
                await asyncio.sleep(0)

    @property
    def refused(self) -> bool:
        return self.transport.closed and b"431 Request Header Fields" in self.transport.written


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /", b"x"),
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n"),
        (b"GET / HTTP/1.1\r\na: ", b"b"),
        (CHUNKED + b"0\r\n", b"a: b\r\n"),
        (CHUNKED + b"0\r\na: ", b"b"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"a: b\r\n"),
    ],
)
async def test_what_does_not_end_is_cut_off(begin: bytes, more: bytes) -> None:
    connection = Connection()
    sent = 0
    await connection.send(begin)
    while not connection.transport.closed:
        await connection.send(more * 10)
        sent += len(more) * 10
        assert sent <= LIMIT + len(more) * 10
    assert connection.refused
    assert sent >= LIMIT


@pytest.mark.parametrize("at_once", [True, False])
async def test_trailers_are_not_headers(at_once: bool) -> None:
    connection = Connection()
    trailers = b"x-slo-class: other\r\nauthorization: Bearer stolen\r\n\r\n"
    reads = [CHUNKED, b"5\r\nhello\r\n0\r\n", trailers, b"GET / HTTP/1.1\r\nc: d\r\n\r\n"]
    await connection.send(*([b"".join(reads)] if at_once else reads))
    first, second = connection.headers
    assert first == [(b"transfer-encoding", b"chunked"), (b"x-slo-class", b"own")]
    assert second == [(b"c", b"d")]
    assert connection.protocol.headers == second
    assert connection.bodies == [5, 0]
    assert not connection.transport.closed


async def test_a_body_before_a_head_is_not_the_head_s() -> None:
    connection = Connection()
    size = 5 * LIMIT
    post = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size
    await connection.send(post, b"x" * 10, b"x" * (size - 10) + b"GET / HTT", b"P/1.1\r\n", b"\r\n")
    assert not connection.transport.closed
    assert connection.bodies == [size, 0]


async def test_long_bodies_pass() -> None:
    connection = Connection()
    chunks = [b"%x\r\n" % LIMIT + b"x" * LIMIT + b"\r\n"] * 20
    await connection.send(CHUNKED, *chunks, b"0\r\n\r\n")
    assert connection.bodies == [20 * LIMIT]
    assert not connection.transport.closed
