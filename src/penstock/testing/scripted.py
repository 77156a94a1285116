"""An engine without a model that believes nothing it is told.

It places real block tables and writes token ids into them where a model would write keys and
values.  Each next token is a function of the tokens *read back through the table*, so a
block that is shared wrongly, reused too early or written twice changes the text, and a test that
compares texts finds it.  A plan that breaks the protocol raises :class:`PlanError` at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from penstock.core.engine import Ticket, Work
from penstock.core.memory import blocks_for, prefix_keys
from penstock.core.types import (
    Capabilities,
    PrefixKey,
    RequestError,
    RequestId,
    StepPlan,
    StepResult,
    Token,
)


class PlanError(AssertionError):
    """A plan that an engine could not have carried out."""


@dataclass(slots=True)
class _Sequence:
    work: Work
    tokens: list[int]
    length: int
    table: list[int] = field(default_factory=list)
    computed: int = 0
    started: bool = False
    stopped: bool = False

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt)


@dataclass(frozen=True, slots=True)
class ScriptedKV:
    """KV of a scripted request: the tokens that its blocks held."""

    held: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.held)

    @property
    def bytes(self) -> int:
        """Eight a token."""
        return 8 * len(self.held)

    @classmethod
    def join(cls, parts: Sequence[ScriptedKV]) -> ScriptedKV:
        """Parts that follow each other, as one."""
        return cls(tuple(token for part in parts for token in part.held))


class ScriptedEngine:
    """Deterministic tokens, strict bookkeeping, modelled seconds.

    Args:
        capabilities: what it shall claim to be able to do.
        vocab_size: token ids are in [0, vocab_size).
        mean_length: requests without a trace length stop after a number of tokens that
            depends on their prompt, between 1 and twice this.
        step_seconds, token_seconds: modelled time of a step, and of each token in it.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        vocab_size: int = 256,
        mean_length: int = 32,
        step_seconds: float = 1e-3,
        token_seconds: float = 1e-5,
    ) -> None:
        self.capabilities = capabilities
        self._vocab_size = vocab_size
        self._mean_length = mean_length
        self._step_seconds = step_seconds
        self._token_seconds = token_seconds
        self._sequences: dict[RequestId, _Sequence] = {}
        size = capabilities.block_size
        self._blocks = [[-1] * size for _ in range(capabilities.kv_blocks)]
        self._refs = [0] * capabilities.kv_blocks
        self._free = deque(range(capabilities.kv_blocks))
        self._cached: dict[PrefixKey, int] = {}
        self._flight: deque[StepResult] = deque()
        self._next_plan = 1
        self.peak_blocks = 0
        self.swapped = 0

    @property
    def used_blocks(self) -> int:
        """Blocks that are not free, cached ones included."""
        return len(self._blocks) - len(self._free)

    @property
    def open_requests(self) -> int:
        """Requests whose payload it keeps."""
        return len(self._sequences)

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take in a payload; refuses token ids outside the vocabulary."""
        _require(request_id not in self._sequences, f"{request_id} is open already")
        for token in (*work.prompt, *work.generated):
            if not 0 <= token < self._vocab_size:
                msg = f"prompt: token id {token} is not in [0, {self._vocab_size})"
                raise RequestError("prompt", msg)
        length = work.trace_length
        if length is None:
            length = 1 + _mix(work.prompt, b"length") % (2 * self._mean_length)
        known = [*work.prompt, *work.generated]
        if work.kv is not None and work.kv.tokens >= len(known):
            msg = f"kv is of {work.kv.tokens} tokens; the request has {len(known)}"
            raise RequestError("kv", msg)
        self._sequences[request_id] = _Sequence(work, known, length)

    def discard(self, request_id: RequestId) -> None:
        """Forget a payload that holds no blocks."""
        sequence = self._sequences.pop(request_id)
        _require(
            not sequence.table, f"{request_id} was discarded with {len(sequence.table)} blocks"
        )

    def take_kv(
        self, request_id: RequestId, start: int = 0, end: int | None = None
    ) -> ScriptedKV | None:
        """What the blocks of a started request hold."""
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.computed or sequence.computed < (end or 0):
            return None
        return ScriptedKV(tuple(self._read(sequence)[start:end]))

    def submit(self, plan: StepPlan) -> Ticket:
        """Carry a plan out, checking every line of it."""
        limit = self.capabilities
        _require(plan.number == self._next_plan, f"plan {plan.number} is out of order")
        _require(len(self._flight) < limit.depth, "more plans in flight than depth allows")
        _require(plan.tokens <= limit.max_step_tokens, f"{plan.tokens} tokens in one step")
        self._next_plan += 1
        for drop in plan.drops:
            self._drop(drop.id, final=drop.final, publish=drop.publish, swapped=drop.swapped)
        for key in plan.forget:
            self._release(self._cached.pop(key))
        for start in plan.starts:
            self._start(start.id, start.tokens, start.cached)
            if start.imported:
                self._import(start.id, start.imported)
        names = [chunk.id for chunk in plan.chunks] + list(plan.decode)
        _require(len(set(names)) == len(names), "a request is named twice in one step")
        running = sum(sequence.started for sequence in self._sequences.values())
        _require(running <= limit.max_batch, f"{running} requests in one batch")
        tokens: dict[RequestId, Token] = {}
        stopped: dict[RequestId, tuple[PrefixKey, ...]] = {}
        for chunk in plan.chunks:
            sequence = self._compute(chunk.id, chunk.start, chunk.tokens)
            caught_up = sequence.computed == len(sequence.tokens)
            _require(chunk.samples == caught_up, f"{chunk.id}: samples is {chunk.samples}")
            if chunk.samples:
                tokens[chunk.id] = self._sample(chunk.id, sequence, stopped)
            for index, key in chunk.publish:
                self._publish(sequence, index, key)
        for request_id in plan.decode:
            known = self._sequences.get(request_id)
            _require(known is not None and known.started, f"{request_id} decodes unstarted")
            sequence = self._compute(request_id, len(self._sequences[request_id].tokens) - 1, 1)
            tokens[request_id] = self._sample(request_id, sequence, stopped)
        self.peak_blocks = max(self.peak_blocks, self.used_blocks)
        seconds = 0.0
        if plan.tokens:
            seconds = self._step_seconds + plan.tokens * self._token_seconds
        due = [name for name in plan.capped if name not in stopped]
        capped = {name: self._keys(self._sequences[name]) for name in due}
        self._flight.append(StepResult(plan.number, seconds, tokens, stopped, capped=capped))
        return Ticket(plan.number)

    def collect(self, ticket: Ticket) -> StepResult:
        """The oldest step's result."""
        _require(bool(self._flight), "nothing is in flight")
        result = self._flight.popleft()
        _require(result.number == ticket.number, f"ticket {ticket.number} is out of order")
        return result

    def close(self) -> None:
        """Forget everything."""
        self._sequences.clear()
        self._flight.clear()

    def expected_text(self, work: Work, cap: int) -> list[int]:
        """The output that a request must have, whatever the policy and the batch."""
        length = work.trace_length
        if length is None:
            length = 1 + _mix(work.prompt, b"length") % (2 * self._mean_length)
        tokens = list(work.prompt)
        while len(tokens) - len(work.prompt) < min(length, cap):
            tokens.append(_mix(tokens, b"token") % self._vocab_size)
        return tokens[len(work.prompt) :]

    def _start(self, request_id: RequestId, tokens: int, cached: Sequence[PrefixKey]) -> None:
        sequence = self._sequences.get(request_id)
        _require(sequence is not None, f"{request_id} starts but was never opened")
        assert sequence is not None
        _require(not sequence.started, f"{request_id} starts twice")
        _require(tokens == len(sequence.tokens), f"{request_id} starts with {tokens} tokens")
        sequence.started = True
        for key in cached:
            _require(key in self._cached, f"{request_id} starts on a block that is not cached")
            block = self._cached[key]
            self._refs[block] += 1
            sequence.table.append(block)
        sequence.computed = len(cached) * self.capabilities.block_size
        _require(sequence.computed < tokens, f"{request_id} has nothing left to compute")

    def _import(self, request_id: RequestId, tokens: int) -> None:
        sequence = self._sequences[request_id]
        kv = sequence.work.kv
        _require(isinstance(kv, ScriptedKV), f"{request_id} brings no KV")
        assert isinstance(kv, ScriptedKV)
        _require(kv.tokens == tokens, f"{request_id} brings KV of {kv.tokens} tokens, not {tokens}")
        sequence.work = sequence.work._replace(kv=None)
        start = sequence.computed
        self._write(sequence, start, kv.held[start:])

    def _write(self, sequence: _Sequence, start: int, held: Sequence[int]) -> None:
        size = self.capabilities.block_size
        while len(sequence.table) < blocks_for(start + len(held), size):
            _require(bool(self._free), "no free KV block is left")
            block = self._free.popleft()
            self._refs[block] = 1
            sequence.table.append(block)
        for position, token in enumerate(held, start):
            block = sequence.table[position // size]
            self._blocks[block][position % size] = token
        sequence.computed += len(held)

    def _compute(self, request_id: RequestId, start: int, count: int) -> _Sequence:
        sequence = self._sequences[request_id]
        _require(sequence.started, f"{request_id} computes but has not started")
        _require(
            start == sequence.computed,
            f"{request_id}: chunk at {start}, not at {sequence.computed}",
        )
        _require(start + count <= len(sequence.tokens), f"{request_id} computes unknown tokens")
        self._write(sequence, start, sequence.tokens[start : start + count])
        return sequence

    def _sample(
        self,
        request_id: RequestId,
        sequence: _Sequence,
        stopped: dict[RequestId, tuple[PrefixKey, ...]],
    ) -> Token:
        token = _mix(self._read(sequence), b"token") % self._vocab_size
        sequence.tokens.append(token)
        if sequence.generated == sequence.length and not sequence.stopped:
            sequence.stopped = True
            stopped[request_id] = self._keys(sequence)
        return Token(token)

    def _keys(self, sequence: _Sequence) -> tuple[PrefixKey, ...]:
        if not self.capabilities.prefix_cache:
            return ()
        return prefix_keys(sequence.tokens[: sequence.computed], self.capabilities.block_size)

    def _read(self, sequence: _Sequence) -> list[int]:
        """What the blocks hold."""
        size = self.capabilities.block_size
        return [
            self._blocks[sequence.table[position // size]][position % size]
            for position in range(sequence.computed)
        ]

    def _drop(
        self,
        request_id: RequestId,
        *,
        final: bool,
        publish: Sequence[tuple[int, PrefixKey]],
        swapped: int,
    ) -> None:
        sequence = self._sequences[request_id]
        _require(sequence.started, f"{request_id} is dropped but holds nothing")
        if swapped:
            _require(not final, f"{request_id} is swapped but does not come back")
            kv = self.take_kv(request_id, 0, swapped)
            _require(swapped == sequence.computed, f"{request_id}: a part of its KV is swapped")
            _require(kv is not None, f"{request_id} has no KV of {swapped} tokens to swap")
            sequence.work = sequence.work._replace(kv=kv)
            self.swapped += swapped
        for index, key in publish:
            self._publish(sequence, index, key)
        for block in sequence.table:
            self._release(block)
        sequence.table.clear()
        sequence.computed = 0
        sequence.started = False
        if final:
            del self._sequences[request_id]

    def _publish(self, sequence: _Sequence, index: int, key: PrefixKey) -> None:
        _require(key not in self._cached, "a key is published twice")
        size = self.capabilities.block_size
        _require((index + 1) * size <= sequence.computed, "a block is published before it is full")
        block = sequence.table[index]
        self._refs[block] += 1
        self._cached[key] = block

    def _release(self, block: int) -> None:
        self._refs[block] -= 1
        _require(self._refs[block] >= 0, f"block {block} is released twice")
        if self._refs[block] == 0:
            self._free.append(block)


def _mix(tokens: Sequence[int], salt: bytes) -> int:
    return crc32(",".join(map(str, tokens)).encode() + salt)


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads like assert
    if not condition:
        raise PlanError(message)
