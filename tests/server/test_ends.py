"""Starts that fail, requests that are still coming when the server goes, uploads that break off."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from penstock.config import ConfigError
from penstock.server.app import build_app
from penstock.server.listen import bind
from penstock.server.service import Service
from penstock.settings import Config
from tests.server.harness import Server, wait_until

# A socket that HTTP cannot be served on, as when another server was quicker.
NO_STREAM = """
import socket, sys
from penstock.server import listen
listen.bind = lambda host, port: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
from penstock.cli import main
sys.argv = ["penstock", "serve", "demo", "--engine", "scripted"]
main()
"""

# SIGTERM while the instances are made ready, with nobody's handler yet or with Ray's.
SIGNALLED = """
import os, signal, sys, time
from penstock.server import serve

def build_backend(*_):
    if sys.argv[-1] == "ray":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)

serve.build_backend = build_backend
from penstock.server.command import serve
sys.exit(serve("demo", engine="scripted", port=0))
"""


def test_a_port_is_taken_before_it_is_served() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port} is in use"):
            bind("127.0.0.1", port)


def test_http_that_cannot_start_is_told() -> None:
    words = [sys.executable, "-c", NO_STREAM]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stderr
    assert '"http_failed"' in ended.stderr
    assert "tream" in ended.stderr, "the reason"


@pytest.mark.parametrize("handler", ["none", "ray"])
def test_sigterm_before_the_engine_is_a_clean_end(handler: str) -> None:
    words = [sys.executable, "-c", SIGNALLED, handler]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (ended.stdout, ended.stderr) == ("", "")


@contextlib.contextmanager
def upload(server: Server) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection on which the server is waiting for a request's body, and that body."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        yield connection, body


def rest(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_drain_waits_for_a_body() -> None:
    with Server("--drain-seconds", "20") as server, upload(server) as (connection, body):
        server.terminate()
        wait_until(lambda: '"draining"' in server.log)
        time.sleep(1.5)  # longer than what the HTTP server itself gives open requests
        connection.sendall(body)
        answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert server.stop() == 0


@pytest.mark.parametrize("hurry", [True, False])
def test_a_body_that_does_not_come_has_an_end(hurry: bool) -> None:
    drain = "20" if hurry else "0.2"
    with Server("--drain-seconds", drain) as server, upload(server) as (connection, _):
        began = time.monotonic()
        server.terminate()
        wait_until(lambda: '"draining"' in server.log)
        if hurry:
            server.terminate()
        answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 503 "), answer
        assert b"shutting_down" in answer
        assert time.monotonic() - began < 5
        assert server.stop() == 0


async def test_a_client_that_leaves_during_its_upload_is_no_fault() -> None:
    nothing = cast("Any", None)
    service = Service(Config(), "demo", nothing, nothing, nothing, time.time(), priorities=False)
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await build_app(service)(scope, receive, send)
    assert sent[0]["status"] == 499
    assert not service.busy
