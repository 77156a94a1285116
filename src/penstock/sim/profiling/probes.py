"""Step times of an OpenAI endpoint, seen from outside.

Problem: a client sees tokens, not steps, and what comes before the first token is as much HTTP and
queue as it is prefill.
Rule: keep so many streams decoding at a time.  The time from one token of a stream to its next
is then the time of a step with so many requests in it, host time included.  While they decode,
send one more prompt that asks for a single token: the steps that compute it are those that
end with that token, and the streams show how long they took.
Limits: the endpoint has to batch continuously and to mix prompts with decoding (vLLM with chunked
prefill does, Penstock does); a prompt that needs more than one step needs its budget known; steps
much shorter than a millisecond drown in what HTTP adds to each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import aiohttp
import numpy as np

from penstock.bench import client
from penstock.bench.client import Answer, Target

_STEADY = 16  # tokens of each stream in a window without prompts
_SETTLE = 4  # tokens of each stream between two prompts
_POLL = 0.004
_MOST_FOR_START = 64


class ProbeError(Exception):
    """The endpoint does not do what a probe needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What to set up: streams that decode, and prompts that join them.

    Attributes:
        batch: streams.
        prompt: tokens of each stream's prompt.
        joins: tokens of the prompts that are sent meanwhile, one after another.
        repeats: how often.
    """

    batch: int
    prompt: int
    joins: tuple[int, ...]
    repeats: int = 3

    @property
    def output(self) -> int:
        """Tokens that a stream needs to last to the end."""
        per_join = 4 * _SETTLE
        return _MOST_FOR_START + 2 * _STEADY + self.repeats * len(self.joins) * per_join


@dataclass(slots=True)
class Stream:
    """One request of a probe: its prompt's length, and what came."""

    prompt: int
    answer: Answer


@dataclass(slots=True)
class Seen:
    """What a probe saw.

    Attributes:
        windows: (begin, end) of times in which all streams decoded and nothing else was asked.
        joined: the prompts that joined.
    """

    probe: Probe
    streams: list[Stream]
    windows: list[tuple[float, float]] = field(default_factory=list)
    joined: list[Stream] = field(default_factory=list)


class Prober:
    """Runs probes on an endpoint, over one pool of connections.

    Args:
        low, high: prompts are random token ids in ``[low, high)``.
        seed: of the prompts; no two are alike.
    """

    def __init__(
        self, session: aiohttp.ClientSession, target: Target, low: int, high: int, seed: int = 0
    ) -> None:
        self._session = session
        self._target = target
        self._low, self._high = low, high
        self._random = np.random.default_rng(seed)

    async def alone(self, tokens: int) -> float:
        """TTFT of a prompt on an idle endpoint, in seconds.

        Raises:
            ProbeError: the endpoint fails.
        """
        stream, task = self._send(tokens, 1)
        await _end(task)
        return _first(stream) - stream.answer.sent

    async def run(self, probe: Probe) -> Seen:
        """Run a probe.

        Raises:
            ProbeError: the endpoint fails, or does not serve so many streams at a time.
        """
        async with self._decoding(probe) as (seen, tasks):
            await self._steady(seen, tasks)
            for _ in range(probe.repeats):
                for tokens in probe.joins:
                    stream, task = self._send(tokens, 1)
                    await _end(task)
                    seen.joined.append(stream)
                    await _more(seen.streams, tasks, _SETTLE)
            await self._steady(seen, tasks)
        return seen

    async def _steady(self, seen: Seen, tasks: Sequence[asyncio.Task[None]]) -> None:
        await _more(seen.streams, tasks, 1)
        began = perf_counter()
        await _more(seen.streams, tasks, _STEADY)
        seen.windows.append((began, perf_counter()))

    @contextlib.asynccontextmanager
    async def _decoding(self, probe: Probe) -> AsyncIterator[tuple[Seen, list[asyncio.Task[None]]]]:
        """Streams that have all begun; they are cut on leaving."""
        pairs = [self._send(probe.prompt, probe.output) for _ in range(probe.batch)]
        streams, tasks = [stream for stream, _ in pairs], [task for _, task in pairs]
        try:
            await _more(streams, tasks, 2)
            yield Seen(probe, streams), tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self, prompt: int, output: int) -> tuple[Stream, asyncio.Task[None]]:
        ids: list[int] = self._random.integers(self._low, self._high, size=prompt).tolist()
        body = client.body_of(self._target, ids, output, {"ignore_eos": True})
        answer = Answer(perf_counter())
        job = client.complete(self._session, self._target, body, answer)
        return Stream(prompt, answer), asyncio.create_task(job)


async def _more(
    streams: Sequence[Stream], tasks: Sequence[asyncio.Task[None]], tokens: int
) -> None:
    """Wait until each stream has so many more tokens."""
    wanted = [len(stream.answer.arrivals) + tokens for stream in streams]
    while any(
        len(stream.answer.arrivals) < most for stream, most in zip(streams, wanted, strict=True)
    ):
        for task in tasks:
            if task.done():
                await _end(task)
                msg = (
                    f"a stream ended before all {len(streams)} had decoded together; the endpoint "
                    "does not run so many at a time, or keeps to no ignore_eos: try fewer"
                )
                raise ProbeError(msg)
        await asyncio.sleep(_POLL)


async def _end(task: asyncio.Task[None]) -> None:
    try:
        await task
    except (
        client.RefusedError,
        client.ExpiredError,
        client.ServerError,
        aiohttp.ClientError,
        TimeoutError,
    ) as error:
        msg = f"a probe failed: {type(error).__name__}: {error}"
        raise ProbeError(msg) from None


def _first(stream: Stream) -> float:
    if not stream.answer.arrivals:
        msg = f"a prompt of {stream.prompt} tokens brought no output"
        raise ProbeError(msg)
    return stream.answer.arrivals[0]
