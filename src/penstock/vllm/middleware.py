"""What vLLM's HTTP server lacks for promises: headers in, honest refusals out.

For ``--middleware penstock.vllm.Middleware``.  On the way in, ``x-slo-...`` headers and the body's
``slo`` become members of ``vllm_xargs``, which reach the scheduler.  On the way out, an answer that
the scheduler ended (:mod:`penstock.vllm.verdict`) becomes the status that it deserves: 429 with
``Retry-After``, 504, 400; or, once a stream has begun, an error event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.errors import ApiError, invalid
from penstock.server.slo import resolve
from penstock.settings import SLOClass
from penstock.vllm.intake import ANSWER, SLO_ARGUMENTS, TRACE
from penstock.vllm.outcome import Answer
from penstock.vllm.settings import read

PATHS = ("/v1/completions", "/v1/chat/completions")
XARGS = "vllm_xargs"


class Middleware:
    """Stands before vLLM's HTTP application.

    Args:
        app: what comes behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._classes: Mapping[str, SLOClass] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        ours = scope["type"] == "http" and scope["method"] == "POST"
        if not ours or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        if self._classes is None:  # vLLM's configuration is known by now
            self._classes = read(scope["app"].state.vllm_config.additional_config).slo
        answer = Answer(send)
        await self._app(scope, _Intake(scope, receive, answer, self._classes), answer)


class _Intake:
    """What the application receives: the request's body, with its promise where vLLM takes it.

    The body is read when the application asks for it, so that whoever has no key costs nothing.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        answer: Answer,
        classes: Mapping[str, SLOClass],
    ) -> None:
        self._scope = scope
        self._classes = classes
        self._receive = receive
        self._answer = answer
        self._read = False

    async def __call__(self) -> Message:
        if self._read:
            return await self._answer.or_over(self._receive)
        self._read = True
        body = await _whole(self._receive)
        if body is None:
            return {"type": "http.disconnect"}
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in self._scope["headers"]}
        try:
            body = with_promise(headers, body, self._classes, uuid4().hex)
        except ApiError as error:
            await self._answer.refuse(error)
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}


def with_promise(
    headers: Mapping[str, str], body: bytes, classes: Mapping[str, SLOClass], answer: str
) -> bytes:
    """The body with the promise, and the answer's name, where vLLM takes them.

    A body that is none stays as it is.  An answer has no name where vLLM's server could not carry a
    verdict: beam search, whose steps are requests of their own, and echoes with log probabilities.

    Raises:
        ApiError: 400: a header or a member that cannot be right.
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return body  # vLLM says what is wrong with it
    if not isinstance(decoded, dict):
        return body
    slo = decoded.pop("slo", None)
    if not isinstance(slo, dict | None):
        raise invalid("slo", f'slo is {slo!r}; it must be an object such as {{"ttft_ms": 500}}')
    given = _promise(headers, slo or {}, classes)
    if TRACE in decoded:
        given[TRACE] = decoded.pop(TRACE)
    more = decoded.get(XARGS) or {}
    if not isinstance(more, dict):
        return body  # likewise
    for name in given.keys() & more.keys():
        if given[name] != more[name]:
            msg = f"{XARGS}.{name} is {more[name]!r}, but the promise says {given[name]!r}"
            raise invalid(f"{XARGS}.{name}", f"{msg}; they must not differ")
    if not (decoded.get("use_beam_search") or (decoded.get("echo") and decoded.get("logprobs"))):
        given[ANSWER] = answer
    return msgspec.json.encode({**decoded, XARGS: {**more, **given}})


def _promise(
    headers: Mapping[str, str], slo: dict[str, Any], classes: Mapping[str, SLOClass]
) -> dict[str, object]:
    """What was asked for, as arguments; the class's own bounds are not among them."""
    known = {name.removeprefix("slo_") for name in SLO_ARGUMENTS}
    unknown = sorted(slo.keys() - known)
    if unknown:
        words = ", ".join(sorted(known))
        raise invalid(f"slo.{unknown[0]}", f"slo.{unknown[0]} is unknown; slo has: {words}")
    promise = resolve(headers, slo, classes)
    given: dict[str, object] = {}
    for argument in SLO_ARGUMENTS:
        name = argument.removeprefix("slo_")
        value = slo.get(name, headers.get("x-slo-" + name.replace("_", "-")))
        if value is not None:
            given[argument] = promise.slo_class if name == "class" else float(value)
    return given


async def _whole(receive: Receive) -> bytes | None:
    """The request's body; None if the client left before it was whole."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
