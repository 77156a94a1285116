"""Clients that leave, an engine process that dies, a server that is told to go."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.server.harness import Server, long_completion, wait_until


def leave_early(server: Server, *, stream: bool) -> None:
    """Begin a request and close the connection in the middle of it."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(long_completion(3000, stream=stream)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(1)
        wait_until(lambda: server.stats()["kv_usage"] > 0)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_memory(server: Server, stream: bool) -> None:
    leave_early(server, stream=stream)
    left = time.monotonic()
    wait_until(lambda: server.stats()["kv_usage"] == 0, 2.0)
    assert time.monotonic() - left < 1.0, "far longer than a step"
    assert server.stats()["open"] == server.stats()["running"] == 0
    assert server.metric("kv_cache_usage_perc") == 0


def test_slow_reader_is_owed_only_text() -> None:
    with Server("--trace-lengths") as server, httpx.Client(timeout=30) as http:
        body = long_completion(400, stream=True)
        with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            wait_until(lambda: server.stats()["open"] == 0)  # the engine never waits for a reader
            text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")


def test_killed_engine_fails_everyone_and_comes_back() -> None:
    with Server("--trace-lengths") as server:

        def whole() -> httpx.Response:
            return server.post("/v1/completions", long_completion(3000))

        with ThreadPoolExecutor(2) as pool, server.client() as client:
            waiting = pool.submit(whole)
            stream = client.completions.create(**long_completion_of_client(3000), stream=True)
            next(iter(stream))
            wait_until(lambda: server.stats()["running"] == 2)
            first = server.engine_pid
            os.kill(first, signal.SIGKILL)
            killed = time.monotonic()
            with pytest.raises(openai.APIError, match="ended unexpectedly") as error:
                list(stream)
            answer = waiting.result()
            assert time.monotonic() - killed < 1.0
        assert error.value.code == "engine_died"
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_died"
        assert int(answer.headers["retry-after"]) >= 1
        # Loading takes far longer than this request.
        assert server.get("/ready").status_code == 503
        assert server.metric("engine_up") == 0
        refused = server.post("/v1/completions", {"model": "demo", "prompt": "x"})
        assert refused.json()["error"]["code"] == "engine_not_ready"
        assert server.get("/health").status_code == 200
        wait_until(lambda: server.get("/ready").status_code == 200, 30)
        assert server.engine_pid != first
        assert server.metric("engine_restarts_total") == 1
        assert server.metric("engine_up") == 1
        with server.client() as client:
            again = client.completions.create(model="demo", prompt="x", max_tokens=4)
        assert again.choices[0].finish_reason in ("length", "stop")


def test_sigterm_drains() -> None:
    server = Server("--trace-lengths", "--drain-seconds", "20")
    with server, server.client() as client, httpx.Client(timeout=10) as http:
        stream = client.completions.create(**long_completion_of_client(400), stream=True)
        next(iter(stream))
        assert http.get(f"{server.url}/ready").status_code == 200
        server.terminate()
        wait_until(lambda: http.get(f"{server.url}/ready").status_code == 503)
        refused = http.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "stop"
        assert server.stop() == 0


def test_drain_has_an_end() -> None:
    with Server("--trace-lengths", "--drain-seconds", "0.3") as server, server.client() as client:
        stream = client.completions.create(**long_completion_of_client(3000), stream=True)
        next(iter(stream))
        began = time.monotonic()
        server.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.stop() == 0
        assert time.monotonic() - began < 5


def test_second_signal_ends_the_drain() -> None:
    with Server("--trace-lengths") as server, server.client() as client:
        stream = client.completions.create(**long_completion_of_client(6000), stream=True)
        next(iter(stream))
        server.terminate()
        wait_until(lambda: '"draining"' in server.log)
        server.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.stop() == 0


def test_engine_leaves_with_a_killed_front_end() -> None:
    server = Server()
    with server:
        engine = server.engine_pid
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not alive(engine), 5)
        server.stop()
        server.status = 0  # it was killed by this test


def long_completion_of_client(tokens: int) -> dict[str, object]:
    body = long_completion(tokens)
    return {
        **{key: body[key] for key in ("model", "prompt", "max_tokens")},
        "extra_body": {"trace_output_tokens": tokens},
    }


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
