"""From a request to the reply that serves it: sliced, passed on whole, or refused by name."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from penstock.core.types import Request
from penstock.router.answer import Answer
from penstock.router.body import Completion, cap_of, decode, fault, parse
from penstock.router.pool import Pool
from penstock.router.reply import ForwardedReply, OnEnd, SlicedReply
from penstock.router.settings import Settings
from penstock.server.errors import ApiError, invalid, unavailable
from penstock.server.service import request_id_of

_PASSED = frozenset({"authorization", "traceparent", "tracestate"})
_CHARACTERS = 4  # per token of a prompt, about; only what a slice is said to cost depends on it


@dataclass(slots=True)
class Service:
    """What the routes share.

    Attributes:
        models: as the backends list them.
        open: replies that have not ended.
        idle: set while there are none.
        draining: set on the way out; new requests get 503.
    """

    settings: Settings
    pool: Pool
    models: list[dict[str, Any]]
    open: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    log: Any = field(default_factory=lambda: structlog.get_logger("penstock.http"))

    @property
    def names(self) -> list[str]:
        """Ids of the models."""
        return [model["id"] for model in self.models]

    def complete(self, raw: bytes, headers: Mapping[str, str]) -> SlicedReply | ForwardedReply:
        """``POST /v1/completions``.

        Raises:
            ApiError: the request was refused.
        """
        self._check_open()
        body = decode(raw, self.names)
        cap, name = cap_of(body), fault(body)
        slice_tokens = self.settings.slice_tokens
        if name is not None:
            if slice_tokens and cap > slice_tokens:
                msg = f"{name} cannot be continued over slices, and max_tokens {cap} is more than"
                hint = f"one ({slice_tokens}); leave {name} out, or ask for at most {slice_tokens}"
                raise invalid(name, f"{msg} {hint}", "unsupported_parameter")
            return self._forward("/v1/completions", raw, body, headers)
        completion = parse(body)
        self._check_ids(completion)
        on_end = self._on_end("/v1/completions", headers)
        request = _request(completion.prompt, cap)
        return SlicedReply(self.pool, request, Answer(completion), _passed(headers), on_end)

    def chat(self, raw: bytes, headers: Mapping[str, str]) -> ForwardedReply:
        """``POST /v1/chat/completions``.

        Raises:
            ApiError: the request was refused.
        """
        self._check_open()
        body = decode(raw, self.names)
        return self._forward("/v1/chat/completions", raw, body, headers)

    def _forward(
        self, path: str, raw: bytes, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> ForwardedReply:
        request = _request(raw, max(1, self.settings.slice_tokens))
        on_end = self._on_end(path, headers)
        stream = body.get("stream") is True
        return ForwardedReply(
            self.pool, request, path, raw, _passed(headers), on_end, stream=stream
        )

    def _check_open(self) -> None:
        if self.draining:
            retry = max(1, round(self.settings.drain_seconds))
            error = unavailable("the router is shutting down", "shutting_down", retry)
            error.headers["connection"] = "close"
            raise error

    def _check_ids(self, completion: Completion) -> None:
        if isinstance(completion.prompt, str):
            return
        silent = [b.url for b in self.pool.backends.values() if not b.returns_ids]
        if silent and 0 < self.settings.slice_tokens < completion.cap:
            msg = "prompt is token ids, and cannot be continued with the output's: no token ids"
            hint = f"are returned by {', '.join(silent)}; the prompt must be a string"
            raise invalid("prompt", f"{msg} {hint}", "unsupported_parameter")

    def _on_end(self, path: str, headers: Mapping[str, str]) -> OnEnd:
        """Opens the books of a reply; what it returns closes them."""
        request_id, began = request_id_of(headers), time.monotonic()
        self.open += 1
        self.idle.clear()

        def end(status: int, output_tokens: int) -> None:
            self.open -= 1
            if not self.open:
                self.idle.set()
            self.pool.metrics.on_end(path, status, output_tokens)
            self.log.info(
                "request_end",
                request_id=request_id,
                path=path,
                status=status,
                output_tokens=output_tokens,
                e2e_s=round(time.monotonic() - began, 6),
            )

        return end


def refused(service: Service, route: str, path: str, error: ApiError) -> None:
    """Write down a request that got no reply.

    Args:
        route: the path with the names of its parameters instead of their values.
    """
    service.pool.metrics.on_end(route, error.status, 0)
    service.log.info(
        "request_refused",
        path=path,
        status=error.status,
        code=error.code,
        param=error.param,
        message=error.message,
    )


def _request(prompt: str | bytes | list[int], cap: int) -> Request:
    tokens = len(prompt) if isinstance(prompt, list) else len(prompt) // _CHARACTERS
    return Request(uuid.uuid4().hex, max(1, tokens), cap, time.monotonic())


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if name in _PASSED or name.startswith("x-slo-")
    }
