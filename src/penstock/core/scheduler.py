"""The mechanism: keeps the books, asks the five questions, emits numbered plans.

It decides nothing itself.  What it guarantees, whatever the policies answer: plans never exceed
what the engine said it can do; every request ends exactly once; memory named by a plan in flight
is not handed out again; and a request that fits the machine at all is served (when nothing runs,
the head of the queue is admitted over any deferral; when no prompt is computed, others decode).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from penstock.core.admission import Admission, Draft
from penstock.core.books import Books, Confirmed
from penstock.core.entry import Entry
from penstock.core.fits import check_fits
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.lifecycle import State
from penstock.core.loads import load_of_draft
from penstock.core.memory import blocks_for
from penstock.core.packing import pack, resume_all
from penstock.core.policies.base import Policy
from penstock.core.ranking import ranked
from penstock.core.stats import Stats
from penstock.core.types import (
    Capabilities,
    Chunk,
    Ended,
    FinishReason,
    PrefixKey,
    Request,
    RequestError,
    RequestId,
    StepPlan,
    StepResult,
)

_BY_ARRIVAL = attrgetter("seq")
_OWN_ENDS = frozenset({FinishReason.STOP, FinishReason.LENGTH})


class _Flight(NamedTuple):
    """A plan that is not confirmed: its tick, its chunks, and who reaches a cap in it.

    ``load`` is what it computes, where a policy wants to know.
    """

    number: int
    tick: int
    chunks: tuple[Chunk, ...]
    capped: list[Entry]
    load: StepLoad | None


class Scheduler:
    """Plans steps for one engine.

    The clock is an argument of each call; the policies hold what randomness there is.

    Args:
        capabilities: what the engine can do.
        policy: who answers the five questions.
        enforce_caps: end requests at their cap.  False is for studies in which policies are
            told a cap that true lengths exceed.

    Raises:
        ValueError: not all requests of a full batch could decode in one step.
    """

    def __init__(
        self, capabilities: Capabilities, policy: Policy, *, enforce_caps: bool = True
    ) -> None:
        if capabilities.max_step_tokens < capabilities.max_batch:
            msg = (
                f"max_step_tokens is {capabilities.max_step_tokens}; it must be at least "
                f"max_batch ({capabilities.max_batch}), or not all running requests can decode"
            )
            raise ValueError(msg)
        self.capabilities = capabilities
        self.policy = policy
        self._books = Books(capabilities, enforce_caps=enforce_caps, ranked=policy.rank is not None)
        self._admission = Admission(self._books, policy)
        self._flights: deque[_Flight] = deque()
        self._enforce_caps = enforce_caps
        self._arrivals = 0
        self._step_blocks = 0
        self._learns = policy.rank is not None or policy.pack is not None

    @property
    def step_blocks(self) -> int:
        """KV blocks that requests hold while the last plan runs."""
        return self._step_blocks

    @property
    def block_steps(self) -> int:
        """Sum over all decode steps so far of the KV blocks that requests held in them."""
        return self._books.block_steps

    @property
    def evictions(self) -> int:
        """Evictions since the start."""
        return self._books.evictions

    def add(self, request: Request, true_length: int | None = None) -> None:
        """Take a request in.

        Args:
            request: what may be known about it.
            true_length: benchmarks only; handed to the admission policy, where all but the
                oracle ignore it.

        Raises:
            RequestError: the id is in use, the request can never fit, or its prefix has
                more keys than its prompt has full blocks.
        """
        self.validate(request)
        self.enter(request, true_length)

    def enter(self, request: Request, true_length: int | None = None) -> None:
        """:meth:`add` for a caller that has just called :meth:`validate`."""
        if request.prefix and not self.capabilities.prefix_cache:
            request = replace(request, prefix=())
        books = self._books
        if true_length is not None:
            length = min(true_length, request.cap) if self._enforce_caps else true_length
            self.policy.admit.learn_true_length(request.id, length)
        key = self.policy.order.key(request)
        most = blocks_for(request.prompt_tokens + request.cap, self.capabilities.block_size)
        entry = Entry(
            request, self._arrivals, key, request.arrival,
            generated=request.generated, most_blocks=most, first_at=request.first_token,
        )  # fmt: skip
        self._arrivals += 1
        books.entries[request.id] = entry
        books.queue.push(entry)
        books.deadlines.arrived(entry)

    def validate(self, request: Request) -> None:
        """Raise RequestError if :meth:`add` would."""
        books = self._books
        if request.id in books.entries or request.id in books.leaving.ids:
            msg = f"request id {request.id!r} is in use"
            raise RequestError("id", msg)
        check_fits(request, self.capabilities)

    def cancel(
        self,
        request_id: RequestId,
        reason: FinishReason = FinishReason.CANCELLED,
        detail: str = "",
        keys: tuple[PrefixKey, ...] = (),
    ) -> bool:
        """End a request from outside, leaving full blocks behind; False if it is unknown."""
        entry = self._books.entries.get(request_id)
        if entry is None:
            return False
        self._end(entry, reason, self._books.output_tokens(entry), detail, keys)
        return True

    def plan(self, now: float) -> StepPlan | None:
        """Make the next plan, or None if there is nothing to do (yet)."""
        books = self._books
        if books.deadlines.next <= now:
            self._act_on_misses(now)
        if self.policy.pack is not None:
            pack(books, self.policy.pack, now)
        split = self.policy.share.split(books.view(now), self.capabilities.max_step_tokens)
        books.prefill_per_step = max(1, split.prefill)
        draft = Draft(now, books.number + 1, books.leaving.drops, split.prefill)
        books.leaving.drops = []
        decodes = split.decode and self._make_room(draft)
        if decodes:  # some more perhaps than the policy saw: an eviction ends a pause
            room = self.capabilities.max_step_tokens - len(books.decode)
            draft.prefill_left = min(draft.prefill_left, room)
        if self.policy.rank is not None:
            order = ranked(books, self.policy.rank, now)
            rejected = self._admission.run_ranked(draft, order)
        else:
            for entry in books.prefill.values():
                draft.chunk(entry)
            rejected = self._admission.run(draft)
        for ended in rejected:
            self._observe(ended)
        if not (split.decode or draft.chunks):
            decodes = self._make_room(draft)
        return self._emit(draft, decodes=decodes)

    def confirm(self, result: StepResult) -> frozenset[RequestId]:
        """Write down what came of the oldest plan in flight.

        Returns:
            requests whose tokens in this result are void: they had ended before it, or
            failed in it.

        Raises:
            ValueError: it is not the oldest plan's result.
        """
        if not self._flights or self._flights[0].number != result.number:
            expected = self._flights[0].number if self._flights else None
            msg = f"result of plan {result.number}; the oldest plan in flight is {expected}"
            raise ValueError(msg)
        flight = self._flights.popleft()
        books = self._books
        stale = frozenset(books.leaving.lingering).union(result.failed)
        # Before this plan counts as confirmed: they have no token of it.
        for entry in self._in_order(result.failed):
            self.cancel(entry.request.id, FinishReason.FAILED, result.failed[entry.request.id])
        for chunk in flight.chunks if result.failed else ():
            if chunk.id in result.failed:
                for _, key in chunk.publish:
                    books.ledger.void(key)
        tick = flight.tick
        if flight.load is not None and result.steps == 1 and result.seconds > 0:
            self._learn(flight.load, result.seconds)
        if result.steps > 1:
            books.coast(result.steps - 1)
            tick += result.steps - 1
        books.confirmed = Confirmed(books.number if result.steps > 1 else flight.number, tick)
        for entry in self._in_order(result.stopped):
            keys = result.stopped[entry.request.id]
            self._end(entry, FinishReason.STOP, entry.base + tick, keys=keys)
        for entry in flight.capped:
            if entry.state is State.DRAINING:
                keys = result.capped.get(entry.request.id, ())
                self._end(entry, FinishReason.LENGTH, entry.generated, keys=keys)
        if books.leaving.lingering:
            books.release_confirmed()
        return stale

    def take_ended(self) -> tuple[Ended, ...]:
        """Requests that ended since the last call, in order."""
        ended = tuple(self._books.leaving.ended)
        self._books.leaving.ended.clear()
        return ended

    def take_forgotten(self) -> tuple[RequestId, ...]:
        """Requests that ended without KV, which no plan will drop: an engine discards them."""
        leaving = self._books.leaving
        forgotten = tuple(leaving.forgotten)
        leaving.forgotten.clear()
        leaving.ids.difference_update(forgotten)
        return forgotten

    def forget_prefixes(self) -> bool:
        """Empty the prefix cache, as the next plan tells the engine; False while KV is held."""
        return self._books.forget_prefixes()

    def evict_all(self, now: float) -> bool:
        """Evict everybody, as the next plan tells the engine; False with a plan in flight."""
        if not self._flights:
            self._books.evict_all(now)
        return not self._flights

    def stats(self, now: float) -> Stats:
        """The present in numbers."""
        books = self._books
        return Stats(
            waiting=len(books.queue),
            waiting_tokens=books.queue.tokens,
            running=books.running,
            decoding=len(books.decode),
            kv_blocks=books.ledger.capacity,
            block_size=books.ledger.block_size,
            kv_used=books.ledger.used,
            kv_idle=books.ledger.idle,
            plans=books.number,
            evictions=books.evictions,
            admissions=self._admission.admissions,
            admission_rate=self._admission.wait.rate(now),
        )

    def explain(self, request_id: RequestId) -> str | None:
        """Where a request stands and, if it waits, why; None if no such request is there."""
        books = self._books
        entry = books.entries.get(request_id)
        if entry is None:
            return None
        if entry.state in {State.WAITING, State.EVICTED}:
            head = books.queue.peek()
            why = entry.why
            if head is not None and head is not entry and self.policy.rank is None:
                why = f"behind {head.request.id}" + (f" ({head.why})" if head.why else "")
            swapped = f"; KV of {entry.swapped} tokens is in host memory" * (entry.swapped > 0)
            return f"{entry.state}: {why or 'not considered yet'}{swapped}"
        done = books.output_tokens(entry)
        if entry.state is State.PREFILL:
            return f"{entry.state}: {entry.computed} of {entry.total} tokens computed"
        pauses = "; sits out: the others are quicker without it" * (request_id in books.paused)
        return f"{entry.state}: {done} of at most {entry.request.cap} output tokens{pauses}"

    def check(self) -> None:
        """Raise AssertionError if the books contradict themselves (when idle, and in tests)."""
        self._books.check()

    def _in_order(self, named: Iterable[RequestId]) -> list[Entry]:
        """Those that have not ended, by arrival: what follows is not to depend on the engine."""
        entries = self._books.entries
        found = [entries[request_id] for request_id in named if request_id in entries]
        if len(found) > 1:
            found.sort(key=_BY_ARRIVAL)
        return found

    def _act_on_misses(self, now: float) -> None:
        for miss in self._books.deadlines.due(now):
            # One request may miss two promises at once.
            if miss.entry.state is not State.ENDED:
                self._observe(self._books.missed(miss.entry, miss.detail))

    def _make_room(self, draft: Draft) -> bool:
        """Evict until one token more for each decoding request fits; False: sit this step out."""
        books = self._books
        growth = books.decode.growth()
        while growth > books.ledger.free:
            if books.running == 1 and self._flights:
                # It fits alone: what it waits for is the memory of steps in flight.
                return False
            running = books.columns()
            victim = running.ids[self.policy.victim.choose(running)]
            draft.drops.append(books.evict(books.entries[victim], draft.now))
            if books.paused and not len(books.decode):
                resume_all(books)
            growth = books.decode.growth()
        books.ledger.grow(growth)
        return len(books.decode) > 0

    def _emit(self, draft: Draft, *, decodes: bool) -> StepPlan | None:
        """Turn a draft into a plan, and advance the books by it."""
        books = self._books
        forget = books.ledger.take_forgotten()
        if not (decodes or draft.chunks or draft.drops or forget):
            return None
        books.number += 1
        self._step_blocks = books.ledger.used
        load: StepLoad | None = None
        if self._learns:
            load = load_of_draft(draft.chunks, books.decode if decodes else None)
        decode: tuple[RequestId, ...] = ()
        capped: list[Entry] = []
        if decodes:
            books.block_steps += self._step_blocks
            decode = books.decode.ids
            capped = books.decode.tick()
            for entry in capped:
                books.decode.leave(entry)
        chunks: tuple[Chunk, ...] = ()
        if draft.chunks:
            for place, entry in draft.publishing:
                draft.chunks[place] = self._admission.publish(entry, draft.chunks[place])
            chunks = tuple(draft.chunks)
            capped.extend(books.sampled(draft.sampling))
        for entry in capped:
            books.drain(entry)
        for drop in draft.drops:
            if drop.final:
                books.leaving.ids.discard(drop.id)
        self._flights.append(_Flight(books.number, books.decode.ticks, chunks, capped, load))
        repeat = self._repeat() if decodes and not chunks and not capped else 1
        shared = capped if self.capabilities.prefix_cache else ()
        return StepPlan(
            books.number, tuple(draft.drops), forget, tuple(draft.starts), chunks, decode,
            repeat, books.deadlines.next, tuple([entry.request.id for entry in shared]),
        )  # fmt: skip

    def _repeat(self) -> int:
        """How often the plan just made, of decoding only, could be made again in a row."""
        most = self.capabilities.max_repeat
        books = self._books
        # Those that this plan ended wait to be told; who sits in prefill without a chunk was
        # left out by the share policy, for once.
        if most == 1 or books.leaving.ended or books.prefill or not self.policy.share.steady:
            return 1
        if self.policy.pack is not None or (self.policy.rank is not None and len(books.queue)):
            return 1
        further = min(books.quiet_steps(), self._admission.quiet_steps())
        return int(max(1, min(most, 1 + further)))

    def _learn(self, load: StepLoad, seconds: float) -> None:
        for policy in (self.policy.rank, self.policy.pack):
            if policy is not None:
                policy.observe(load, seconds)

    def _end(
        self,
        entry: Entry,
        reason: FinishReason,
        output_tokens: int,
        detail: str = "",
        keys: tuple[PrefixKey, ...] = (),
    ) -> None:
        self._observe(self._books.end(entry, reason, output_tokens, detail, keys))

    def _observe(self, ended: Ended | None) -> None:
        if ended is not None:
            self.policy.admit.observe(ended)
            if self.policy.pack is not None and ended.reason in _OWN_ENDS:
                self.policy.pack.ended(ended.output_tokens)
