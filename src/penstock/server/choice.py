"""One engine request as the front end sees it, and the mailbox of the response it belongs to.

Tokens become text as soon as they arrive, so that a stop string ends its
request in the engine at once even if the client reads slowly.  What the client
has not read yet is merged: a slow reader costs the text it is owed, never a
queue of events.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from penstock.core.types import FinishReason
from penstock.server.errors import ApiError, expired, too_busy, unavailable
from penstock.server.slo import Promise
from penstock.text.stream import TextStream


@dataclass(slots=True)
class Times:
    """When things happened to a request, on the monotonic clock, in seconds."""

    arrival: float
    first: float = 0.0
    last: float = 0.0
    longest_gap: float = 0.0
    end: float = 0.0


@dataclass(slots=True)
class LogprobEntry:
    """A token's log probability and its most likely alternatives.

    ``offset`` is how many characters of the output were there before it.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    offset: int


class Mailbox:
    """Wakes the one task that writes a response, whichever of its choices has news."""

    __slots__ = ("_news", "_waiter")

    def __init__(self) -> None:
        self._news = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """There is news."""
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until there has been news since the last wait."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False


@dataclass(slots=True, eq=False)
class Choice:
    """One output of one prompt.

    Attributes:
        id: the engine request's id.
        index: position in the response's ``choices``.
        prompt_index: which of the request's prompts it answers.
        silent: ids that end a request and are not text (end-of-sequence, ``stop_token_ids``).
        finish_reason: ``stop`` or ``length`` once it ended well.
        error: the error it ended with, otherwise.
        prompt: the prompt's ids, if the client wants ids; only then output ids are kept.
        ids: output ids whose text is out, and at the end all the rest.
    """

    id: str
    index: int
    prompt_index: int
    prompt_tokens: int
    promise: Promise
    times: Times
    text: TextStream
    mailbox: Mailbox
    silent: Collection[int] = ()
    tokens: int = 0
    evictions: int = 0
    pending: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    reason: FinishReason | None = None
    finish_reason: str | None = None
    error: ApiError | None = None
    prompt: Sequence[int] | None = None
    ids: list[int] = field(default_factory=list)
    _unsaid: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.reason is not None

    def token(
        self, token_id: int, detail: tuple[float, list[tuple[int, float]]] | None, now: float
    ) -> bool:
        """Take the next token; True if a stop string came up and the engine should let go."""
        times = self.times
        if self.tokens:
            times.longest_gap = max(times.longest_gap, now - times.last)
        else:
            times.first = now
        times.last = now
        self.tokens += 1
        if self.prompt is not None:
            self._unsaid.append(token_id)
        if token_id in self.silent:
            return False
        offset = self.text.length
        text = self.text.push(token_id)
        if detail is not None:
            self.logprobs.append(LogprobEntry(token_id, *detail, offset))
        if text:
            self.pending += text
            self._say()
            self.mailbox.ring()
        return self.text.stopped

    def end(self, reason: FinishReason, detail: str, now: float, wait: float) -> None:
        """No more tokens will come.  ``wait`` is how long a refused request had better wait."""
        self.reason = reason
        self.times.end = now
        self._say()
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.finish_reason = reason.value
            self.pending += self.text.finish()
            if self.text.stopped:  # a stop string may come up only now, in what was held back
                self.finish_reason = FinishReason.STOP.value
        else:
            self.error = error_of(reason, detail, wait)
        self.mailbox.ring()

    def _say(self) -> None:
        self.ids += self._unsaid
        self._unsaid.clear()

    def take_ids(self) -> list[int]:
        """Ids since the last take."""
        ids, self.ids = self.ids, []
        return ids

    def fail(self, error: ApiError, now: float) -> None:
        """End it with an error that the scheduler knows nothing of."""
        self.reason = FinishReason.FAILED
        self.times.end = now
        self.error = error
        self.mailbox.ring()

    def take(self) -> tuple[str, list[LogprobEntry]]:
        """Text and log probabilities since the last take."""
        text, logprobs = self.pending, self.logprobs
        self.pending, self.logprobs = "", []
        return text, logprobs


def error_of(reason: FinishReason, detail: str, wait: float) -> ApiError:
    """What a client is told of an end that is not a completion."""
    if reason is FinishReason.REJECTED:
        return too_busy(
            f"the request was not admitted: {detail}",
            "request_rejected",
            wait,
            retry_after=max(1, math.ceil(wait)),
        )
    if reason is FinishReason.EXPIRED:
        return expired(detail)
    if reason is FinishReason.CANCELLED:
        return unavailable(f"the request was cancelled: {detail}", "request_cancelled")
    return ApiError(
        500, f"the engine lost the request: {detail}", code="engine_error", kind="server_error"
    )


def met(choice: Choice) -> bool:
    """Whether a request that ended well kept every bound of its promise."""
    if choice.finish_reason is None:
        return False
    slo, times = choice.promise.slo, choice.times
    if not choice.tokens:
        return not slo.broken(None, None, None, None)
    ttft, e2e = times.first - times.arrival, times.last - times.arrival
    return not slo.broken(ttft, time_per_token(choice), times.longest_gap, e2e)


def time_per_token(choice: Choice) -> float:
    """Mean seconds per output token after the first; 0 with fewer than two tokens."""
    if choice.tokens < 2:
        return 0.0
    return (choice.times.last - choice.times.first) / (choice.tokens - 1)
