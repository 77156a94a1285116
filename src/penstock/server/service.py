"""One completion request from its body to an open :class:`~penstock.server.reply.Reply`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from penstock import __version__
from penstock.core.engine import Work
from penstock.core.types import Request
from penstock.server.choice import Choice, Mailbox, Times, met
from penstock.server.client import EngineClient
from penstock.server.errors import ApiError, invalid, too_busy, unavailable
from penstock.server.metrics import Metrics
from penstock.server.prompts import chat_prompt, completion_prompts
from penstock.server.reply import Reply
from penstock.server.requests import (
    MAX_BIASES,
    MAX_CHOICES,
    Body,
    ChatBody,
    CommonBody,
    CompletionBody,
    parse,
)
from penstock.server.shapes import ChatShape, CompletionShape, Shape
from penstock.server.slo import Promise, resolve
from penstock.settings import Config
from penstock.text.stream import TextStream
from penstock.text.tokenizer import TextTokenizer

# Checking this many bytes takes some milliseconds at worst; longer bodies go to a thread.
_LONG_BODY = 1 << 15
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Service:
    """What the routes share.

    Attributes:
        model: id of the one model that is served.
        replies: open responses by response id.
        coming: requests of which there is no reply yet; each one's time-out is how to end it.
        idle: set when the last of both has ended.
        draining: set on the way out; new requests get 503.
    """

    config: Config
    model: str
    text: TextTokenizer
    client: EngineClient
    metrics: Metrics
    started: float
    priorities: bool
    replies: dict[str, Reply] = field(default_factory=dict)
    coming: set[asyncio.Timeout] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    log: Any = field(default_factory=lambda: structlog.get_logger("penstock.http"))

    @property
    def fingerprint(self) -> str:
        """What ``system_fingerprint`` says: outputs may differ when it does."""
        return f"penstock-{__version__}-{self.config.engine.dtype}"

    async def chat(self, raw: bytes, headers: Mapping[str, str]) -> Reply:
        """``POST /v1/chat/completions``.

        Raises:
            ApiError: the request was refused.
        """
        arrival = time.monotonic()
        body = await _read(ChatBody, raw)
        self._check(body, prompts=1)
        prompts = await chat_prompt(self.text, body)
        return self._open(body, prompts, headers, arrival, ChatShape, "chatcmpl")

    async def complete(self, raw: bytes, headers: Mapping[str, str]) -> Reply:
        """``POST /v1/completions``.

        Raises:
            ApiError: the request was refused.
        """
        arrival = time.monotonic()
        body = await _read(CompletionBody, raw)
        self._check(body, prompts=len(body.prompt))
        prompts = await completion_prompts(self.text, body)
        return self._open(body, prompts, headers, arrival, CompletionShape, "cmpl")

    @contextlib.asynccontextmanager
    async def taking_in(self) -> AsyncIterator[None]:
        """Around a request from its head to its reply.

        Raises:
            ApiError: 503, :meth:`give_up_coming` was called.
        """
        try:
            async with asyncio.timeout(None) as limit:
                self.coming.add(limit)
                self.idle.clear()
                try:
                    yield
                finally:
                    self.coming.remove(limit)
                    self._note_idle()
        except TimeoutError:
            raise shutting_down() from None

    def give_up_coming(self) -> None:
        """Refuse all requests of which there is no reply yet."""
        now = asyncio.get_running_loop().time()
        for limit in self.coming:
            if not limit.expired():
                limit.reschedule(now)

    @property
    def busy(self) -> bool:
        """Whether a request is open or coming."""
        return bool(self.replies or self.coming)

    def _note_idle(self) -> None:
        if not self.busy:
            self.idle.set()

    def find(self, name: str) -> Reply | None:
        """The open response of this id, or the latest of this ``x-request-id``."""
        named = (reply for reply in reversed(self.replies.values()) if reply.request_id == name)
        return self.replies.get(name) or next(named, None)

    def _check(self, body: CommonBody, prompts: int) -> None:
        if body.model != self.model:
            msg = f"model {body.model!r} does not exist; this server has {self.model!r}"
            raise ApiError(404, msg, code="model_not_found", param="model")
        if body.trace_output_tokens is not None and not self.config.bench.trace_lengths:
            msg = "trace_output_tokens is only accepted by a server started with --trace-lengths"
            raise invalid("trace_output_tokens", msg, "unsupported_parameter")
        if body.priority and not self.priorities:
            msg = f"priority is {body.priority}, but this server's order ignores priorities"
            raise invalid("priority", msg, "unsupported_parameter")
        choices = prompts * body.n
        if choices > MAX_CHOICES:
            msg = f"{prompts} prompts with n={body.n} ask for too many choices; at most"
            raise invalid(_multiplier(body), f"{msg} {MAX_CHOICES}")
        if len(body.logit_bias) * choices > MAX_BIASES:
            msg = f"logit_bias has {len(body.logit_bias)} token ids; with {choices} choices it may"
            raise invalid("logit_bias", f"{msg} have at most {MAX_BIASES // choices}")

    def _open(
        self,
        body: CommonBody,
        prompts: Sequence[list[int]],
        headers: Mapping[str, str],
        arrival: float,
        make_shape: type[ChatShape | CompletionShape],
        prefix: str,
    ) -> Reply:
        slo = body.slo.model_dump(by_alias=True, exclude_none=True) if body.slo else None
        promise = resolve(headers, slo, self.config.slo)
        if self.client.ready is None:
            # An outage is no time in which all promises are kept.
            count = len(prompts) * body.n
            self.metrics.on_refusal(promise.slo_class, "engine_not_ready", count)
            raise unavailable("the model is still being loaded", "engine_not_ready")
        response_id = f"{prefix}-{uuid.uuid4().hex}"
        parts = self._parts(body, prompts, promise, response_id, arrival)
        self._gate([request for request, _ in parts], promise, _multiplier(body))
        mailbox = Mailbox()
        choices = [
            self._submit(body, request, work, index, index // body.n, promise, mailbox)
            for index, (request, work) in enumerate(parts)
        ]
        options = body.stream_options
        include_usage = options is not None and options.include_usage
        shape: Shape = make_shape(
            response_id,
            int(time.time()),
            self.model,
            self.fingerprint,
            self._token_text,
            with_usage=include_usage,
        )
        request_id = request_id_of(headers)
        reply = Reply(
            self.client,
            choices,
            mailbox,
            shape,
            {"x-request-id": request_id},
            lambda reply, status: self._on_end(reply, status, request_id, response_id),
            stream=body.stream,
            include_usage=include_usage,
        )
        self.replies[response_id] = reply
        self.idle.clear()
        return reply

    def _parts(
        self,
        body: CommonBody,
        prompts: Sequence[list[int]],
        promise: Promise,
        response_id: str,
        arrival: float,
    ) -> list[tuple[Request, Work]]:
        parts = []
        samplings = body.samplings(self.text.vocab_size, self.text.sampling)
        for index in range(len(prompts) * body.n):
            prompt, sampling = prompts[index // body.n], samplings[index % body.n]
            request = Request(
                id=f"{response_id}-{index}",
                prompt_tokens=len(prompt),
                cap=self._cap(len(prompt), body.cap),
                arrival=arrival,
                slo=promise.slo,
                slo_class=promise.slo_class,
                priority=body.priority,
                on_miss=promise.on_miss,
            )
            parts.append((request, Work(prompt, sampling, body.trace_output_tokens)))
        return parts

    def _cap(self, prompt_tokens: int, asked: int | None) -> int:
        ready = self.client.ready
        assert ready is not None
        limit = min(ready.max_request_tokens, ready.kv_tokens)
        room = limit - prompt_tokens
        if room >= max(1, asked or 1):
            return asked or room
        param = "max_tokens" if room >= 1 else "prompt"
        output = f" and max_tokens {asked}" if asked else ""
        msg = (
            f"this model's maximum context length is {limit} tokens, but the prompt has "
            f"{prompt_tokens} tokens{output}; {param} must be smaller"
        )
        raise invalid(param, msg, "context_length_exceeded")

    def _gate(self, requests: Sequence[Request], promise: Promise, field: str) -> None:
        refusal = self.client.refuse(requests)
        if refusal is None:
            return
        if self.client.never(requests) is not None:
            msg = f"{len(requests)} outputs at a time can never be taken: {refusal.limit} is too"
            raise invalid(field, f"{msg} small; {field} must ask for fewer")
        self.metrics.on_refusal(promise.slo_class, refusal.limit, len(requests))
        raise too_busy(
            refusal.reason,
            "queue_full" if refusal.limit.startswith("max_") else "slo_unreachable",
            refusal.predicted_wait,
            retry_after=refusal.retry_after,
            limit=refusal.limit,
        )

    def _submit(
        self,
        body: CommonBody,
        request: Request,
        work: Work,
        index: int,
        prompt_index: int,
        promise: Promise,
        mailbox: Mailbox,
    ) -> Choice:
        silent = {*body.stop_token_ids, *(() if body.ignore_eos else self.text.eos_ids)}
        # A plain completion continues its prompt's text; a chat's answer stands alone.
        context = work.prompt if isinstance(body, CompletionBody) else ()
        choice = Choice(
            id=request.id,
            index=index,
            prompt_index=prompt_index,
            prompt_tokens=request.prompt_tokens,
            promise=promise,
            times=Times(request.arrival),
            text=TextStream(self.text, stop=body.stop, prompt=context),
            mailbox=mailbox,
            silent=silent,
            prompt=context if isinstance(body, CompletionBody) and body.return_token_ids else None,
        )
        self.client.submit(choice, request, work)
        return choice

    def _token_text(self, token: int) -> str:
        return self.text.decode([token], skip_special_tokens=False)

    def _on_end(self, reply: Reply, status: int, request_id: str, response_id: str) -> None:
        del self.replies[response_id]
        self._note_idle()
        first = reply.choices[0]
        times = first.times
        usage = reply.usage
        self.log.info(
            "request_end",
            request_id=request_id,
            id=response_id,
            status=status,
            slo_class=first.promise.slo_class,
            prompt_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            ended=[str(choice.reason) for choice in reply.choices],
            slo_met=all(met(choice) for choice in reply.choices),
            evictions=sum(choice.evictions for choice in reply.choices),
            ttft_s=round(times.first - times.arrival, 6) if first.tokens else None,
            e2e_s=round(times.end - times.arrival, 6),
        )


def shutting_down(retry: int = 1) -> ApiError:
    """The refusal of what a server on its way out will not serve.

    Args:
        retry: whole seconds after which to come back.
    """
    error = unavailable("the server is shutting down", "shutting_down", retry)
    # Its body may not have been read, so the connection cannot be used again.
    error.headers["connection"] = "close"
    return error


async def _read(kind: type[Body], raw: bytes) -> Body:
    return parse(kind, raw) if len(raw) <= _LONG_BODY else await asyncio.to_thread(parse, kind, raw)


def _multiplier(body: CommonBody) -> str:
    # The field to make smaller where a request asks for too many outputs.
    return "n" if body.n > 1 else "prompt"


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's ``x-request-id``, or a new one.

    Raises:
        ApiError: 400, it is not an id.
    """
    given = headers.get("x-request-id")
    if given is None:
        return uuid.uuid4().hex
    if _REQUEST_ID.fullmatch(given) is None:
        msg = f"x-request-id is {given[:140]!r}; it must be 1 to 128 of A-Z a-z 0-9 . _ : -"
        raise invalid("x-request-id", msg)
    return given
