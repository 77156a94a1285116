"""A small OpenAI endpoint that keeps to ``trace_output_tokens`` and misbehaves as told."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeServer:
    """Streams tokens at a fixed pace.  ``bodies`` holds every request it got, trials included.

    After ``silent_after`` bodies no answer begins any more.
    """

    url: str = ""
    token_seconds: float = 0.001
    hook: bool = True
    natural: int = 4
    refuse_next: int = 0
    retry_after: str = "0.05"
    expire_next: int = 0
    break_next: int = 0
    stall_next: int = 0
    stall_seconds: float = 0.2
    first_token_seconds: float = 0.0
    silent_after: int = sys.maxsize
    evictions: int = 0
    kv_use: float = 0.5
    running: int = 0
    most_running: int = 0
    left: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The bodies without the trial request."""
        return self.bodies[1:]

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if len(self.bodies) > 1:
            if self.refuse_next:
                self.refuse_next -= 1
                return _error(429, "queue is full", {"retry-after": self.retry_after})
            if self.expire_next:
                self.expire_next -= 1
                return _error(504, "too late", {})
        if "trace_output_tokens" in body and not self.hook:
            return _error(400, "trace_output_tokens is not a parameter", {})
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        done = False
        try:
            length = body.get("trace_output_tokens") or self.natural
            if body.get("ignore_eos"):
                length = body["max_tokens"]
            length = min(length, body["max_tokens"])
            chat = "messages" in body
            if chat:
                yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            trial = len(self.bodies) == 1
            await asyncio.sleep(0 if trial else self.first_token_seconds)
            if any(body is late for late in self.bodies[self.silent_after :]):
                await asyncio.sleep(60)
            for i in range(length):
                if not trial and i == 1 and self.break_next:
                    self.break_next -= 1
                    yield _event({"error": {"message": "engine died", "code": "engine"}})
                    return
                if not trial and i == 1 and self.stall_next:
                    self.stall_next -= 1
                    self.evictions += 1
                    await asyncio.sleep(self.stall_seconds)
                piece = {"delta": {"content": " w"}} if chat else {"text": " w"}
                yield _event({"choices": [{**piece, "finish_reason": None}]})
                await asyncio.sleep(self.token_seconds)
            last = {"delta": {}} if chat else {"text": ""}
            yield _event({"choices": [{**last, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": {"completion_tokens": length}})
            yield b"data: [DONE]\n\n"
            done = True
        finally:
            self.running -= 1
            self.left += not done

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse(
            "# TYPE penstock:num_preemptions counter\n"
            f'penstock:num_preemptions_total{{model_name="m"}} {self.evictions}\n'
            "# TYPE penstock:kv_cache_usage_perc gauge\n"
            f'penstock:kv_cache_usage_perc{{model_name="m"}} {self.kv_use}\n'
            "# TYPE penstock:num_requests_running gauge\n"
            f'penstock:num_requests_running{{model_name="m"}} {self.running}\n'
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake-model"}]})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/metrics", self.metrics),
            ]
        )


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _error(status: int, message: str, headers: dict[str, str]) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    fake = FakeServer()
    config = uvicorn.Config(
        fake.app(), host="127.0.0.1", port=0, log_level="error", ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    fake.url = f"http://127.0.0.1:{port}"
    yield fake
    server.should_exit = True
    thread.join()
