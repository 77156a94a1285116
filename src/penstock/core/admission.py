"""The admission pass: those first in order ask for memory, until one is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.books import Books
from penstock.core.entry import Entry
from penstock.core.forecast.wait import WaitForecast
from penstock.core.lifecycle import State
from penstock.core.policies.base import Admit, Defer, Judge, Policy, Reject
from penstock.core.snapshot import Candidate
from penstock.core.types import Drop, Ended, FinishReason, PrefixKey, Start


@dataclass(slots=True)
class Draft:
    """A plan in the making.

    Attributes:
        chunks: (request, first token, tokens).
        sampling: requests whose last chunk is in this plan.
        prefill_left: tokens that chunks may still take.
    """

    now: float
    drops: list[Drop]
    prefill_left: int
    starts: list[Start] = field(default_factory=list)
    chunks: list[tuple[Entry, int, int]] = field(default_factory=list)
    sampling: list[Entry] = field(default_factory=list)

    def chunk(self, entry: Entry) -> None:
        """Give a request in prefill as much of the step as there is."""
        left = entry.total - entry.computed
        tokens = min(left, self.prefill_left)
        if tokens <= 0:
            return
        self.chunks.append((entry, entry.computed, tokens))
        self.prefill_left -= tokens
        entry.computed += tokens
        if tokens == left:
            self.sampling.append(entry)


@dataclass(slots=True)
class _Turn:
    """A pass.

    Attributes:
        left: how many may still start.
        places: that the engine's batch has left for them.
        judge: once there is one.
        rejected: by it.
    """

    left: int
    places: int
    judge: Judge | None = None
    rejected: list[Ended] = field(default_factory=list)


class Admission:
    """Asks the policy, and starts those it admits."""

    def __init__(self, books: Books, policy: Policy) -> None:
        self._books = books
        self._policy = policy
        # Whom the last pass ended at, the releases up to then, and the tick to ask again at.
        self._blocked: tuple[Entry, int] | None = None
        self._wake: float = 0
        self._next_pass = 0
        # When somebody was left waiting last: who waited then had to.
        self._left_waiting = -math.inf
        self.wait = WaitForecast()
        self.admissions = 0

    def run(self, draft: Draft) -> list[Ended]:
        """One pass; returns those the policy rejected."""
        head = self._books.queue.peek()
        rejected = self._in_order(draft, head) if self._opens(draft, head) else []
        self._note_who_waits(draft.now)
        return rejected

    def _in_order(self, draft: Draft, head: Entry | None) -> list[Ended]:
        books = self._books
        turn = self._turn(len(books.queue))
        at_once = self._policy.at_once
        while head is not None and (draft.prefill_left > 0 or at_once):
            if not self._ask(draft, turn, head):
                break
            head = books.queue.peek()
        return turn.rejected

    def run_ranked(self, draft: Draft, order: Sequence[Entry]) -> list[Ended]:
        """One pass over those in prefill and those that wait, in this order."""
        waiting = len(self._books.queue)
        first = next((entry for entry in order if entry.state is not State.PREFILL), None)
        asking = self._opens(draft, first)
        turn = self._turn(waiting)
        for entry in order:
            if draft.prefill_left <= 0:
                break
            if entry.state is State.PREFILL:
                draft.chunk(entry)
            elif asking:
                asking = self._ask(draft, turn, entry)
        self._note_who_waits(draft.now)
        return turn.rejected

    def _turn(self, waiting: int) -> _Turn:
        books = self._books
        return _Turn(self._policy.per_pass or waiting, books.capabilities.max_batch - books.slots)

    def _opens(self, draft: Draft, head: Entry | None) -> bool:
        """Whether there is to be a pass; ``head`` is the first that waits."""
        if head is None or draft.prefill_left <= 0 or not self._due(head):
            return False
        self._next_pass = self._books.number + self._policy.period
        return True

    def _note_who_waits(self, now: float) -> None:
        """The clock of the forecast runs while this pass has left somebody waiting.

        Everyone waits for the step that runs when they come; that says nothing of a queue.
        """
        if len(self._books.queue):
            self._left_waiting = now
            self.wait.waiting(now)
        else:
            self.wait.emptied(now)

    def _ask(self, draft: Draft, turn: _Turn, head: Entry) -> bool:
        """Ask for one that waits; whether the pass goes on."""
        books = self._books
        if turn.places <= 0:
            places = books.capabilities.max_batch
            head.why = f"the batch is full: {books.slots} of {places} places taken"
            self._block(head, None)
            return False
        # One evicted from a plan in flight must have that plan's token first.
        if head.last_plan > books.confirmed.number:
            return False
        cached, held = books.hits(head) if head.request.prefix else (0, 0)
        candidate = self._candidate(draft, head, cached, held)
        judge = turn.judge
        if judge is None:
            judge = turn.judge = self._policy.admit.judge(books.view(draft.now))
        answer = judge(candidate)
        if isinstance(answer, Admit):
            if candidate.blocks <= books.ledger.free:
                self._start(draft, turn, head, candidate.blocks + held - cached, cached)
                return turn.left > 0
            answer = Defer(f"KV memory: {candidate.blocks} blocks needed, {books.ledger.free} free")
        if isinstance(answer, Reject):
            tokens = books.output_tokens(head)
            turn.rejected.append(books.end(head, FinishReason.REJECTED, tokens, answer.reason))
            return True
        if self._alone(candidate):
            self._start(draft, turn, head, candidate.blocks + held - cached, cached)
        else:
            head.why = answer.reason
            self._block(head, self._policy.admit.holds)
        # This pass's judge does not count on whom it deferred.
        return False

    def quiet_steps(self) -> float:
        """Steps after the plan just made in which no pass could bring anything new."""
        books = self._books
        head = books.queue.peek()
        if head is None:
            return math.inf
        blocked = self._blocked == (head, books.releases)
        by_policy = self._wake - books.decode.ticks if blocked else 0
        return max(by_policy, self._next_pass - books.number)

    def published(self, index: int, key: PrefixKey) -> None:
        """A block became shareable: who was refused may need less memory now."""
        if self._blocked is not None:
            prefix = self._blocked[0].request.prefix
            if index < len(prefix) and prefix[index] == key:
                self._blocked = None

    def _block(self, head: Entry, holds: int | None) -> None:
        """The pass ended at this one; asking again makes sense once memory is given back."""
        self._blocked = (head, self._books.releases)
        self._wake = math.inf if holds is None else self._books.decode.ticks + holds

    def _due(self, head: Entry) -> bool:
        """Whether asking can bring anything new."""
        if not self._books.running:
            return True
        if self._books.number < self._next_pass:
            return False
        blocked = self._blocked == (head, self._books.releases)
        return not blocked or self._books.decode.ticks >= self._wake

    def _alone(self, candidate: Candidate) -> bool:
        """Nothing runs, so to defer a request that fits would be to starve it."""
        return not self._books.running and candidate.blocks <= self._books.ledger.free

    def _candidate(self, draft: Draft, entry: Entry, cached: int, held: int) -> Candidate:
        books = self._books
        size, total = books.ledger.block_size, entry.total
        rest = total - max(cached * size, entry.imported) - draft.prefill_left
        # In the order of its fields: by name costs twice as much, for every request.
        return Candidate(
            entry.request, entry.seq, entry.generated, entry.evictions, held * size,
            -(-total // size) - held, -(-rest // books.prefill_per_step) if rest > 0 else 0,
            entry.most_blocks,
        )  # fmt: skip

    def _start(self, draft: Draft, turn: _Turn, entry: Entry, own: int, cached: int) -> None:
        """Start it on so many blocks of its own, behind the cached ones."""
        request = entry.request
        keys = request.prefix[:cached]
        if entry.evictions == 0 and entry.waited_since <= self._left_waiting:
            self.wait.admitted(draft.now)
        start = Start(request.id, entry.total, keys, entry.imported)
        self._books.start(entry, own, keys)
        self.admissions += 1
        draft.starts.append(start)
        draft.chunk(entry)
        turn.left -= 1
        turn.places -= 1
