"""The admission pass: those first in order ask for memory, until one is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.books import Books
from penstock.core.entry import Entry
from penstock.core.forecast.wait import WaitForecast
from penstock.core.lifecycle import State
from penstock.core.policies.base import Admit, Defer, Judge, Policy, Reject, Skip
from penstock.core.snapshot import Candidate
from penstock.core.types import Chunk, Drop, Ended, FinishReason, PrefixKey, Start


@dataclass(slots=True)
class Draft:
    """A plan in the making.

    Attributes:
        number: of the plan that it becomes.
        prefill_left: tokens that chunks may still take.
        publishing: places in ``chunks`` of those that may fill blocks to be shared, and whose.
        sampling: requests whose last chunk is in this plan.
    """

    now: float
    number: int
    drops: list[Drop]
    prefill_left: int
    starts: list[Start] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    publishing: list[tuple[int, Entry]] = field(default_factory=list)
    sampling: list[Entry] = field(default_factory=list)

    def chunk(self, entry: Entry) -> None:
        """Give a request in prefill as much of the step as there is."""
        computed, most = entry.computed, self.prefill_left
        tokens = entry.total - computed
        last = tokens <= most
        if not last:
            tokens = most
        if tokens <= 0:
            return
        request = entry.request
        if request.prefix:
            self.publishing.append((len(self.chunks), entry))
        self.chunks.append(Chunk(request.id, computed, tokens, last))
        self.prefill_left = most - tokens
        entry.computed = computed + tokens
        entry.last_plan = self.number
        if last:
            self.sampling.append(entry)


@dataclass(slots=True)
class _Turn:
    """A pass.

    Attributes:
        left: how many may still start.
        places: that the engine's batch has left for them.
        waited: those who started and had been left waiting before.
        starting: those who start on nothing but blocks of their own, so many each: they take them
            together.
        taken: the sum of these blocks.
        judge: once there is one.
        rejected: by it.
        skipped: by it; in order, they are out of the queue until the pass is over.
    """

    left: int
    places: int
    waited: int = 0
    starting: list[tuple[Entry, int]] = field(default_factory=list)
    taken: int = 0
    judge: Judge | None = None
    rejected: list[Ended] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)


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
        if not self._opens(draft, head):
            self._note_who_waits(draft.now)
            return []
        turn = self._in_order(draft, head)
        self._note_who_waits(draft.now, turn.waited)
        return turn.rejected

    def _in_order(self, draft: Draft, head: Entry | None) -> _Turn:
        books = self._books
        turn = self._turn(len(books.queue))
        at_once = self._policy.at_once
        try:
            while head is not None and (draft.prefill_left > 0 or at_once):
                if not self._ask(draft, turn, head):
                    break
                if turn.skipped and turn.skipped[-1] is head:
                    books.queue.remove(head)
                head = books.queue.peek()
        finally:
            self._settle(turn)
            for entry in turn.skipped:
                books.queue.push(entry)
        return turn

    def run_ranked(self, draft: Draft, order: Sequence[Entry]) -> list[Ended]:
        """One pass over those in prefill and those that wait, in this order."""
        waiting = len(self._books.queue)
        first = next((entry for entry in order if entry.state is not State.PREFILL), None)
        asking = self._opens(draft, first)
        turn = self._turn(waiting)
        try:
            for entry in order:
                if draft.prefill_left <= 0 and not (asking and self._policy.at_once):
                    break
                if entry.state is State.PREFILL:
                    draft.chunk(entry)
                elif asking:
                    asking = self._ask(draft, turn, entry)
        finally:
            self._settle(turn)
        self._note_who_waits(draft.now, turn.waited)
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

    def _note_who_waits(self, now: float, waited: int = 0) -> None:
        """So many were let in who had to wait; somebody may have to now.

        The clock of the forecast runs while this pass has left somebody waiting.
        Everyone waits for the step that runs when they come; that says nothing of a queue.
        """
        if waited:
            self.wait.admitted(now, waited)
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
            head.why = f"the batch is full: {places - turn.places} of {places} places taken"
            self._block(head, None)
            return False
        # One evicted from a plan in flight must have that plan's token first.
        if head.last_plan > books.confirmed.number:
            return False
        cached = held = 0
        if head.request.prefix:
            self._settle(turn)
            cached, held = books.hits(head)
        candidate = self._candidate(draft, head, cached, held)
        judge = turn.judge
        if judge is None:
            judge = turn.judge = self._policy.admit.judge(books.view(draft.now))
        answer = judge(candidate)
        free = books.ledger.free - turn.taken
        if isinstance(answer, Admit):
            if candidate.blocks <= free:
                self._start(draft, turn, head, candidate.blocks + held - cached, cached)
                return turn.left > 0
            answer = Defer(f"KV memory: {candidate.blocks} blocks needed, {free} free")
        if isinstance(answer, Reject):
            tokens = books.output_tokens(head)
            turn.rejected.append(books.end(head, FinishReason.REJECTED, tokens, answer.reason))
            return True
        if isinstance(answer, Skip):
            head.why = answer.reason
            turn.skipped.append(head)
            return True
        # Nothing runs, so to defer a request that fits would be to starve it.
        if not books.running and not turn.starting and candidate.blocks <= free:
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

    def publish(self, entry: Entry, chunk: Chunk) -> Chunk:
        """Name the blocks that a chunk fills, for others to share from the next plan on."""
        books, request = self._books, entry.request
        end = chunk.start + chunk.tokens
        full = min(end // books.ledger.block_size, len(request.prefix))
        publish: list[tuple[int, PrefixKey]] = []
        for index, key in enumerate(request.prefix[entry.published : full], entry.published):
            if books.ledger.publish(entry.holding, key):
                publish.append((index, key))
                self._published(index, key)
        entry.published = max(entry.published, full)
        return chunk._replace(publish=tuple(publish))

    def _published(self, index: int, key: PrefixKey) -> None:
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

    def _candidate(self, draft: Draft, entry: Entry, cached: int, held: int) -> Candidate:
        books = self._books
        request, generated = entry.request, entry.generated
        size, total = books.ledger.block_size, request.prompt_tokens + generated
        lag = 0
        if total > draft.prefill_left:
            rest = total - max(cached * size, entry.imported) - draft.prefill_left
            lag = max(0, -(-rest // books.prefill_per_step))
        # In the order of its fields: by name costs twice as much, for every request.
        return Candidate(
            request, entry.seq, generated, entry.evictions, held * size,
            -(-total // size) - held, lag, entry.most_blocks,
        )  # fmt: skip

    def _start(self, draft: Draft, turn: _Turn, entry: Entry, own: int, cached: int) -> None:
        """Start it on so many blocks of its own, behind the cached ones."""
        request, imported = entry.request, entry.imported
        if entry.evictions == 0 and entry.waited_since <= self._left_waiting:
            turn.waited += 1
        self._books.queue.remove(entry)
        if cached or imported:
            keys = request.prefix[:cached]
            draft.starts.append(Start(request.id, entry.total, keys, imported))
            self._settle(turn)
            self._books.start_behind(entry, own, keys)
        else:
            draft.starts.append(Start(request.id, entry.total))
            turn.starting.append((entry, own))
            turn.taken += own
        draft.chunk(entry)
        self.admissions += 1
        turn.left -= 1
        turn.places -= 1

    def _settle(self, turn: _Turn) -> None:
        """Those who start so far take their memory."""
        if turn.starting:
            self._books.start(turn.starting)
            turn.starting.clear()
            turn.taken = 0
