"""The router as a process: keys, refusals at the start, and the way out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from tests.router.harness import Router
from tests.server.harness import Server, penstock, wait_until

# A socket that HTTP cannot be served on, as when another server was quicker.
NO_STREAM = """
import socket, sys
from penstock.server import listen
listen.bind = lambda host, port: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
from penstock.cli import main
sys.argv = ["penstock", "route", "--port", "4321", "--api-key", "key", "--backend", sys.argv[1]]
main()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--trace-lengths", "--api-keys", "key") as server:
        yield server


def tokens(number: int) -> dict[str, object]:
    extra = {"trace_output_tokens": number}
    return {"model": "demo", "prompt": "x", "max_tokens": number, "extra_body": extra}


def test_keys_drain_and_second_signal(server: Server) -> None:
    refused = penstock("route", "--backend", server.url)
    assert refused.returncode == 2
    assert f"--backend {server.url} cannot be used" in refused.stderr
    assert "API key" in refused.stderr
    with (
        Router(server.url, flags=("--slice-tokens", "50", "--api-key", "key")) as router,
        router.client(api_key="key") as client,
        router.client(api_key="wrong") as wrong,
    ):
        with pytest.raises(openai.AuthenticationError, match="a valid API key"):
            wrong.completions.create(**tokens(4))
        chunks = list(client.completions.create(**tokens(170), stream=True))
        assert chunks[-1].choices[0].finish_reason == "stop"  # at its length, as it was told
        ended = client.completions.create(**tokens(300), stream=True)
        cut = client.completions.create(**tokens(3000), stream=True)
        next(iter(ended))
        next(iter(cut))
        router.terminate()
        wait_until(lambda: router.get("/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(**tokens(4))
        assert list(ended)[-1].choices[0].finish_reason == "stop"
        router.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(cut)
        assert router.stop() == 0
    wait_until(lambda: server.stats()["open"] == 0, 3)


def test_http_that_cannot_start_is_told(server: Server) -> None:
    words = [sys.executable, "-c", NO_STREAM, server.url]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("penstock: --host 127.0.0.1 --port 4321: HTTP cannot be served there: ")
    assert "tream" in last, "the reason"


def test_a_port_in_use_is_told(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    ended = penstock("route", "--backend", server.url, "--api-key", "key", "--port", port)
    assert ended.returncode == 2
    assert f"--port {port} is in use on 127.0.0.1" in ended.stderr
