"""One streamed request to an OpenAI endpoint, timed.

aiohttp on uvloop: at 64 streams a server-sent event costs 27 us of CPU here,
with httpx 70 us, and client and server may share two cores.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, TypeAlias

import aiohttp
import msgspec

Api: TypeAlias = Literal["completions", "chat"]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, as newer servers call it


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Fault(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Fault | None = None


class _Body(msgspec.Struct):
    error: _Fault = msgspec.field(default_factory=_Fault)


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint.

    Attributes:
        url: base address, with or without ``/v1``.
        model: the model's name there.
        api: which of the two completion routes.
        key: API key, sent as a bearer token; empty for none.
        timeout: seconds after which an attempt counts as an error, above 0.
    """

    url: str
    model: str
    api: Api = "completions"
    key: str = field(default="", repr=False)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            msg = f"url is {self.url!r}; it must begin with http:// or https://"
            raise ValueError(msg)
        if not 0 < self.timeout < float("inf"):
            msg = f"timeout is {self.timeout}; it must be a number of seconds above 0"
            raise ValueError(msg)

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def route(self) -> str:
        """Where completions are posted."""
        tail = "chat/completions" if self.api == "chat" else "completions"
        return f"{self.root}/v1/{tail}"

    def session(self) -> aiohttp.ClientSession:
        """A connection pool without a limit of its own."""
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        return aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
        )


class RefusedError(Exception):
    """429 or 503: too busy.  ``retry_after`` in seconds, None if the server does not say."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ExpiredError(Exception):
    """The server gave the request up because its deadline passed."""


class ServerError(Exception):
    """Any other answer that is not a completion."""


@dataclass(slots=True)
class Answer:
    """What has come so far; filled while the stream runs, so a cut one shows what it had.

    Attributes:
        arrivals: times of the pieces with output.
        usage: output tokens by the server's count, once it has said.
        text: the output, only if asked to keep it.
    """

    sent: float
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    usage: int | None = None
    text: list[str] | None = None

    @property
    def output_tokens(self) -> int:
        """By the server's count if there is one, else one per piece."""
        return len(self.arrivals) if self.usage is None else self.usage


def body_of(
    target: Target,
    prompt: list[int] | str,
    max_tokens: int,
    extra: Mapping[str, object],
) -> bytes:
    """The JSON body of a streamed request."""
    content: dict[str, object] = (
        {"messages": [{"role": "user", "content": prompt}]}
        if target.api == "chat"
        else {"prompt": prompt}
    )
    return msgspec.json.encode(
        {
            "model": target.model,
            **content,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extra,
        }
    )


async def complete(
    session: aiohttp.ClientSession, target: Target, body: bytes, answer: Answer
) -> None:
    """Send a request and note into ``answer`` when its output comes.

    Raises:
        RefusedError, ExpiredError, ServerError: it did not complete.
        aiohttp.ClientError, TimeoutError: the connection failed.
    """
    answer.sent = perf_counter()
    async with session.post(target.route, data=body) as response:
        if response.status != 200:
            await _raise(response)
        async for data in _events(response):
            if data == b"[DONE]":
                return
            _take(answer, data, chat=target.api == "chat")
    msg = "the stream ended without [DONE]"
    raise ServerError(msg)


_decode = msgspec.json.Decoder(_Event).decode


def _take(answer: Answer, data: bytes, *, chat: bool) -> None:
    now = perf_counter()
    try:
        event = _decode(data)
    except msgspec.DecodeError as error:
        msg = f"an event is not what OpenAI sends: {error}"
        raise ServerError(msg) from None
    if event.error is not None:
        _raise_fault(event.error)
    if event.usage is not None:
        answer.usage = event.usage.completion_tokens
    for choice in event.choices:
        delta = choice.delta or _Delta()
        thought = delta.reasoning_content or delta.reasoning
        text = choice.text or delta.content or thought or ""
        # A chat stream opens with the role alone; any stream may close with the reason alone.
        # Other empty pieces are tokens whose text is not complete yet.
        if text or not (chat or choice.finish_reason):
            answer.arrivals.append(now)
        if answer.text is not None:
            answer.text.append(text)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event (OpenAI sends one data line per event)."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _raise(response: aiohttp.ClientResponse) -> None:
    text = await response.read()
    try:
        message = msgspec.json.decode(text, type=_Body).error.message
    except msgspec.DecodeError:
        message = text[:200].decode(errors="replace")
    status = response.status
    if status in {429, 503}:
        raise RefusedError(message, _seconds(response.headers.get("retry-after")))
    if status == 504:
        raise ExpiredError(message)
    full = f"HTTP {status}: {message}"
    raise ServerError(full)


def _raise_fault(fault: _Fault) -> None:
    if fault.code == "deadline_exceeded":
        raise ExpiredError(fault.message)
    msg = f"error in the stream: {fault.message or fault.code}"
    raise ServerError(msg)


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
