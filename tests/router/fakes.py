"""Backends in this process whose next token is known, and that misbehave when told to.

The token after ``n`` is ``n + 1``, written `` wN``; so a text with a token missing, repeated or out
of place is seen at once, and a continuation is right only if its prompt ends where the text does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from penstock.router.app import build_app
from penstock.router.backend import open_session
from penstock.router.metrics import Metrics
from penstock.router.pool import Pool
from penstock.router.serve import inspect, make_backends
from penstock.router.service import Service
from penstock.router.settings import Settings
from penstock.server.listen import HttpServer, bind


@dataclass
class Fault:
    """What a request meets instead of an answer.

    ``after`` tokens it is answered with ``status``; the connection breaks if that is 0, and nothing
    more comes if it is -1.  A body of bytes is sent as it is, any other one as JSON.
    """

    after: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    delay: float = 0.0

    async def answer(self) -> Response:
        await asyncio.sleep(self.delay)
        if isinstance(self.body, bytes):
            return Response(self.body, self.status, self.headers)
        return JSONResponse(self.body or {}, self.status, self.headers)


def said(first: int, last: int) -> str:
    """The text of these tokens."""
    return "".join(f" w{number}" for number in range(first, last + 1))


class Listening:
    """An application on a port of this machine, 0 for a free one."""

    def __init__(self, app: ASGIApp, port: int = 0) -> None:
        self._server = HttpServer(app, 1 << 15)
        self._sock = bind("127.0.0.1", port)
        self._sock.setblocking(False)
        self.port = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._sock]))
        await self._server.listening.wait()

    async def stop(self) -> None:
        assert self._task is not None
        self._server.should_exit = self._server.force_exit = True
        await self._task


class Fake:
    """A backend on a port of its own.

    Args:
        ids: it returns token ids.
        halves: tokens that are no multiple of 3 are parts of characters: without text of their
            own, written U+FFFD at the end of an answer, and lost at the end of a prompt.
        mute: tokens have no text at all.
        last: the token that ends every answer.
    """

    def __init__(
        self,
        *,
        ids: bool = True,
        model: str = "fake",
        halves: bool = False,
        mute: bool = False,
        last: int = 1 << 30,
        context: int | None = None,
    ) -> None:
        self.ids, self.model, self.halves, self.mute = ids, model, halves, mute
        self.last, self.context = last, context
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.listing: bytes | None = None  # instead of its models
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = 0
        self.pace = 0.0
        self.answers = asyncio.Event()
        self.answers.set()
        self._server: Listening | None = None
        self._port = 0
        self.url = ""

    async def start(self) -> None:
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )
        self._server = Listening(app, self._port)
        await self._server.start()
        self.url, self._port = self._server.url, self._server.port

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None

    def forget(self) -> None:
        """The requests so far, probes among them, do not count."""
        self.bodies.clear()
        self.headers.clear()

    async def _models(self, request: Request) -> Response:
        del request
        await self.answers.wait()
        if self.listing is not None:
            return Response(self.listing)
        entry: dict[str, Any] = {"id": self.model, "object": "model"}
        if self.context is not None:
            entry["max_model_len"] = self.context
        return JSONResponse({"object": "list", "data": [entry]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        fault = self.always or (self.faults.popleft() if self.faults else None)
        if fault is not None and fault.status > 0:
            return await fault.answer()
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": "whole", "index": 0}]})
        return StreamingResponse(self._stream(body, fault), media_type="text/event-stream")

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        await self.answers.wait()
        fault = self.always or (self.faults.popleft() if self.faults else None)
        if fault is not None and fault.status > 0:
            return await fault.answer()
        if not body.get("stream"):
            await asyncio.sleep(self.pace)
            return JSONResponse({"choices": [{"message": {"content": "whole"}}]})

        async def events() -> AsyncIterator[bytes]:
            for number in range(4):
                if fault is not None and number == fault.after:
                    msg = "the connection breaks"
                    raise ConnectionError(msg)
                yield b'data: {"choices":[{"delta":{"content":"c%d"}}]}\n\n' % number
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], fault: Fault | None) -> AsyncIterator[bytes]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            known = [int(word) for word in re.findall(r"w(\d+)", prompt)] or [0]
        else:
            known = prompt
        first = known[-1] + 1
        last = min(self.last, first + body["max_tokens"] - 1)
        shown: dict[str, Any] = {"prompt_token_ids": known}
        try:
            for token in range(first, last + 1):
                if fault is not None and token - first == fault.after:
                    await self._misbehave(fault)
                text, finish = self._text(token, known[-1], last), None
                if token == last:
                    finish = "stop" if token == self.last else "length"
                yield self._event(
                    text, token, finish, shown if body.get("return_token_ids") else None
                )
                shown = {}
                await asyncio.sleep(self.pace)
            usage = {"prompt_tokens": len(known), "completion_tokens": last - first + 1}
            yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise

    def _text(self, token: int, before: int, last: int) -> str:
        if self.mute:
            return ""
        if not self.halves:
            return f" w{token}"
        if token % 3:
            return "\ufffd" if token == last else ""
        return f" w{token}" if before <= token - 3 else ""

    def _event(self, text: str, token: int, finish: str | None, more: Any) -> bytes:
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
        if self.ids and more is not None:
            choice |= {"token_ids": [token], **more}
        return b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n"

    async def _misbehave(self, fault: Fault) -> None:
        if fault.status < 0:
            await asyncio.sleep(60)
        msg = "the connection breaks"
        raise ConnectionError(msg)


class Routed:
    """A router in this process, and a client of it."""

    def __init__(self, service: Service, client: httpx.AsyncClient) -> None:
        self.service = service
        self.client = client

    async def post(self, tokens: int, prompt: Any = " w1", **more: Any) -> httpx.Response:
        body = {"model": "fake", "prompt": prompt, "max_tokens": tokens, **more}
        return await self.client.post("/v1/completions", json=body)

    async def text(self, tokens: int, prompt: Any = " w1", **more: Any) -> str:
        answer = await self.post(tokens, prompt, **more)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def metric(self, name: str) -> float:
        text = self.service.pool.exposition().decode()
        found = re.findall(rf"^penstock:router_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))


DEFAULTS = Settings(
    backend=("http://x",), slice_tokens=5, gap_timeout=2.0, backoff=0.1, max_wait=2.0
)


@contextlib.asynccontextmanager
async def routed(*fakes: Fake, **flags: Any) -> AsyncIterator[Routed]:
    """A router before these backends; leaving checks that nothing is left open."""
    async with contextlib.AsyncExitStack() as stack:
        running: list[Fake | Listening] = []
        stack.push_async_callback(lambda: asyncio.gather(*(one.stop() for one in running)))
        for fake in fakes:
            await fake.start()
            running.append(fake)
        settings = replace(DEFAULTS, backend=tuple(fake.url for fake in fakes), **flags)
        session = await stack.enter_async_context(open_session(settings.gap_timeout))
        backends = make_backends(settings, session)
        models = await inspect(backends, 1.0)
        for fake in fakes:
            fake.forget()
        pool = Pool(settings, backends, Metrics(), time.monotonic, "fake")
        stack.push_async_callback(pool.close)
        service = Service(settings, pool, models)
        server = Listening(build_app(service))
        await server.start()
        running.append(server)
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            yield Routed(service, client)
            await until(lambda: service.open == 0)
            pool.check()


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that must come true."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - tests look at state that says nothing by itself
            await asyncio.sleep(0.01)
