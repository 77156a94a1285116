"""A simulated engine for real clients: made-up tokens, at the pace of a latency model.

What it says means nothing, when it says it does: a step takes as long as the model says that it
would, so that clients, gateways and dashboards meet the queues, gaps and evictions of a machine
that is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from penstock.bench.fitted import fitted
from penstock.core.engine import Ticket, Work
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.loads import load_of
from penstock.core.memory import prefix_keys
from penstock.core.types import (
    Capabilities,
    PrefixKey,
    RequestError,
    RequestId,
    StepPlan,
    StepResult,
    Token,
)
from penstock.sim.kv import SimKV

LENGTHS = "azure-conversation"
"""Whose output lengths requests get: median 128 tokens, 5 % above 450."""

_DRAWS = 4096
_TOKENS_AT_ONCE = 256


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request; ``script`` holds the tokens it will say, as far as they are made up by now."""

    work: Work
    length: int | None
    source: np.random.Generator
    says_end: bool
    generated: int = 0
    script: list[int] = field(default_factory=list)


class ServedEngine:
    """Carries plans out in real time; see :class:`penstock.core.engine.Engine`.

    A request's tokens depend on its prompt and its seed alone: the same greedy request gets the
    same answer.  It ends at its trace length if it has one.  Else its length is drawn from the
    fit :data:`LENGTHS` by a generator seeded with the same two and ``seed``, and its last token
    is an end-of-sequence token; a stop token that comes up earlier ends it there, and
    one that ignores the end of sequence goes on to its cap.  Other sampling parameters have
    no effect, and there are no log probabilities.

    Steps that follow each other directly end when the model says, whatever the host did between
    them, as long as it needs less time than the model.

    Args:
        capabilities: of the machine that is simulated; of depth 1.
        latency: durations of its steps.
        vocab_size: token ids are in [0, vocab_size).
        words: the tokens that it says, except for an end; all but ``eos_ids`` if empty.
        eos_ids: end-of-sequence tokens.
        speed: steps take this many times less than the model says.
        seed: of the lengths.
        clock, sleep: the time that passes.

    Raises:
        ValueError: the depth is not 1, or ``speed`` is not a positive number.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        latency: LatencyModel,
        *,
        vocab_size: int,
        words: Collection[int] = (),
        eos_ids: Collection[int] = (),
        speed: float = 1.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if capabilities.depth != 1:
            msg = f"capabilities.depth is {capabilities.depth}; a simulated engine has depth 1"
            raise ValueError(msg)
        if not 0 < speed < float("inf"):
            msg = f"speed is {speed}; it must be a positive number"
            raise ValueError(msg)
        self.capabilities = capabilities
        self._latency = latency
        self._vocab_size = vocab_size
        self._eos_ids = tuple(token for token in eos_ids if token < vocab_size)
        known = np.array(tuple(words) or range(vocab_size), dtype=np.int64)
        self._ordinary = np.setdiff1d(known, self._eos_ids)
        self._speed = speed
        self._seed = seed
        self._clock = clock
        self._sleep = sleep
        drawn = fitted(LENGTHS, _DRAWS, seed).output
        assert drawn is not None
        self._lengths: NDArray[np.int64] = drawn
        self._sequences: dict[RequestId, _Sequence] = {}
        self._started: set[RequestId] = set()
        self._due = float("-inf")
        self._result: StepResult | None = None

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take in a request's payload.

        Raises:
            RequestError: a token is not in the vocabulary.
        """
        for token in (*work.prompt, *work.generated):
            if not 0 <= token < self._vocab_size:
                msg = f"prompt: token id {token} is not in [0, {self._vocab_size})"
                raise RequestError("prompt", msg)
        known = len(work.prompt) + len(work.generated)
        if work.kv is not None and work.kv.tokens >= known:
            msg = f"kv is of {work.kv.tokens} tokens; the request has {known}, the last without KV"
            raise RequestError("kv", msg)
        named = np.array(work.prompt, dtype=np.int64).tobytes()
        source = np.random.default_rng([crc32(named), work.sampling.seed or 0, self._seed])
        length, says_end = work.trace_length, False
        drawn = int(source.choice(self._lengths))
        if length is None and self._eos_ids and not work.sampling.ignore_eos:
            length, says_end = drawn, True
        had = len(work.generated)
        self._sequences[request_id] = _Sequence(work, length, source, says_end, generated=had)

    def discard(self, request_id: RequestId) -> None:
        """Forget a request."""
        del self._sequences[request_id]

    def take_kv(
        self, request_id: RequestId, start: int = 0, end: int | None = None
    ) -> SimKV | None:
        """Its size: all tokens but the latest have KV."""
        if request_id not in self._started:
            return None
        sequence = self._sequences[request_id]
        there = len(sequence.work.prompt) + sequence.generated - 1
        return SimKV((there if end is None else end) - start)

    def submit(self, plan: StepPlan) -> Ticket:
        """Begin a step."""
        for drop in plan.drops:
            self._started.discard(drop.id)
            if drop.final:
                self.discard(drop.id)
        follows = bool(self._started)
        self._started.update(start.id for start in plan.starts)
        tokens: dict[RequestId, Token] = {}
        stopped: dict[RequestId, tuple[PrefixKey, ...]] = {}
        load = self._load(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                self._say(chunk.id, tokens, stopped)
        for request_id in plan.decode:
            self._say(request_id, tokens, stopped)
        seconds = 0.0
        if plan.tokens:
            seconds = self._latency.seconds(load) / self._speed
            now = self._clock()
            # Time that the host took since the last step is part of this one.  It is not owed
            # beyond that: a host that was held up does not hurry afterwards.
            self._due = max(self._due + seconds, now) if follows else now + seconds
        due = [name for name in plan.capped if name not in stopped]
        capped = {name: self._keys(self._sequences[name]) for name in due}
        self._result = StepResult(plan.number, seconds, tokens, stopped, capped=capped)
        return Ticket(plan.number)

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait until the step is over."""
        result = self._result
        assert result is not None
        assert result.number == ticket.number
        self._result = None
        left = self._due - self._clock()
        if left > 0:
            self._sleep(left)
        return result

    def close(self) -> None:
        """Forget everything."""
        self._sequences.clear()
        self._started.clear()

    def _load(self, plan: StepPlan) -> StepLoad:
        """What the step computes; a decoding request attends to its newest token too."""
        contexts = [
            len(sequence.work.prompt) + sequence.generated
            for sequence in map(self._sequences.__getitem__, plan.decode)
        ]
        longest = max(contexts, default=0)
        chunks = ((chunk.start, chunk.tokens) for chunk in plan.chunks)
        return load_of(len(contexts), sum(contexts), longest, chunks)

    def _say(
        self,
        request_id: RequestId,
        tokens: dict[RequestId, Token],
        stopped: dict[RequestId, tuple[PrefixKey, ...]],
    ) -> None:
        sequence = self._sequences[request_id]
        at = sequence.generated
        while at >= len(sequence.script):
            drawn = sequence.source.integers(len(self._ordinary), size=_TOKENS_AT_ONCE)
            sequence.script += self._ordinary[drawn].tolist()
        sequence.generated += 1
        ends = sequence.generated == sequence.length
        if ends and sequence.says_end:
            sequence.script[at] = self._eos_ids[0]
        token = sequence.script[at]
        traced = sequence.work.trace_length is not None
        if ends or (not traced and token in sequence.work.sampling.stop_token_ids):
            stopped[request_id] = self._keys(sequence)
        tokens[request_id] = Token(token)

    def _keys(self, sequence: _Sequence) -> tuple[PrefixKey, ...]:
        """Of all full blocks; the latest token has no KV."""
        if not self.capabilities.prefix_cache:
            return ()
        known = [*sequence.work.prompt, *sequence.script[: sequence.generated - 1]]
        return prefix_keys(known, self.capabilities.block_size)
