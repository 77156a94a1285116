"""Who is where and who holds what: the state behind the scheduler, without its decisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.core.deadlines import Deadlines
from penstock.core.entry import DecodeSet, Entry
from penstock.core.lifecycle import State
from penstock.core.memory import Ledger
from penstock.core.queue import WaitingQueue
from penstock.core.snapshot import Columns, Snapshot, nothing
from penstock.core.types import (
    Capabilities,
    Drop,
    Ended,
    FinishReason,
    OnMiss,
    PrefixKey,
    RequestId,
)


@dataclass(slots=True)
class Confirmed:
    """The last confirmed plan: its number, and the decode set's ticks in it."""

    number: int = 0
    tick: int = 0


@dataclass(slots=True)
class Leaving:
    """Requests on their way out.

    Attributes:
        lingering: ended, but named by a plan in flight; the keys are of blocks to leave behind.
        drops: ended and free to go: the next plan tells the engine.
        forgotten: ended without memory; no plan will name them.
        ended: not yet told to the runtime.
        ids: all of the first three: ids not to be used again yet.
    """

    lingering: dict[RequestId, tuple[Entry, tuple[PrefixKey, ...]]] = field(default_factory=dict)
    drops: list[Drop] = field(default_factory=list)
    forgotten: list[RequestId] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    ids: set[RequestId] = field(default_factory=set)


class Books:
    """The scheduler's state, and the moves that keep it consistent."""

    def __init__(
        self, capabilities: Capabilities, *, enforce_caps: bool = True, ranked: bool = False
    ) -> None:
        self.capabilities = capabilities
        self._enforce_caps = enforce_caps
        self.ledger = Ledger(capabilities.kv_blocks, capabilities.block_size)
        self.queue = WaitingQueue(table=ranked)
        self.decode = DecodeSet(capabilities.block_size, enforce_caps=enforce_caps)
        self.prefill: dict[RequestId, Entry] = {}
        # Those in State.DECODE that do not advance in the plan being made.
        self.paused: dict[RequestId, Entry] = {}
        self.draining: dict[RequestId, Entry] = {}
        self.entries: dict[RequestId, Entry] = {}
        self.deadlines = Deadlines()
        self.leaving = Leaving()
        self.number = 0
        self.confirmed = Confirmed()
        self.releases = 0
        self.evictions = 0
        self.prefill_per_step = 1
        self.reserved = 0
        self.swapped = 0
        self.block_steps = 0

    @property
    def running(self) -> int:
        """Requests that hold memory and have tokens to come."""
        return len(self.decode) + len(self.prefill) + len(self.paused)

    @property
    def slots(self) -> int:
        """Requests that occupy a place in the engine's batch."""
        return self.running + len(self.draining) + len(self.leaving.lingering)

    def start(self, starting: Iterable[tuple[Entry, int]]) -> None:
        """Requests that have left the queue take their memory: so many blocks of their own each."""
        prefill, number = self.prefill, self.number + 1
        blocks = reserved = 0
        for entry, own in starting:
            entry.move(State.PREFILL)
            entry.holding.private += own
            entry.last_plan = number
            entry.why = ""
            prefill[entry.request.id] = entry
            blocks += own
            reserved += entry.most_blocks
        self.ledger.grow(blocks)
        self.reserved += reserved

    def start_behind(self, entry: Entry, own: int, keys: Sequence[PrefixKey]) -> None:
        """:meth:`start` one behind cached blocks, or behind KV that comes along."""
        self.ledger.take(entry.holding, 0, keys)
        entry.published = len(keys)
        entry.computed = max(len(keys) * self.ledger.block_size, entry.imported)
        if entry.swapped:
            self._forget_swapped(entry)
        self.start(((entry, own),))

    def hits(self, entry: Entry) -> tuple[int, int]:
        """Cached blocks that one that waits can begin with, and how many of them someone holds."""
        # At least one token must be computed, or there is nothing to sample from.
        return self.ledger.hits(entry.request.prefix, (entry.total - 1) // self.ledger.block_size)

    def cached_tokens(self, entry: Entry) -> int:
        """Tokens of it that need not be computed if it starts now."""
        return self.hits(entry)[0] * self.ledger.block_size

    def coast(self, steps: int) -> None:
        """Further steps in which every decoding request got a token and nothing else happened."""
        needed, total = self.decode.coast(steps)
        self.block_steps += steps * self.ledger.used + total
        self.ledger.grow(needed)
        self.number += steps

    def quiet_steps(self) -> int:
        """Further steps in which all that decode can go on: no cap reached, no memory short.

        There may be more than it says; someone decodes.
        """
        ledger = self.ledger
        steps = self.decode.ticks_within(ledger.free - ledger.idle)
        to_cap = self.decode.ticks_to_cap()
        return steps if to_cap is None else min(steps, to_cap - 1)

    def evict(self, entry: Entry, now: float) -> Drop:
        """Take a running request's memory; it waits again.

        Its KV goes to host memory if there is room for all of it.
        """
        if entry.state is State.DECODE:
            paused = entry.request.id in self.paused
            entry.latest_at = entry.latest_at if paused else now
        elif not entry.evictions:
            entry.latest_at = now
        self._stop_running(entry)
        if self.swapped + entry.computed <= self.capabilities.swap_tokens:
            entry.swapped = entry.computed
            self.swapped += entry.swapped
        self.ledger.give_back(entry.holding)
        self.releases += 1
        self.evictions += 1
        entry.move(State.EVICTED)
        entry.evictions += 1
        entry.computed = entry.published = 0
        entry.waited_since = now
        entry.why = "evicted: KV memory overflowed"
        self.queue.push(entry)
        self.deadlines.evicted(entry)
        return Drop(entry.request.id, final=False, swapped=entry.swapped)

    def evict_all(self, now: float) -> None:
        """Take everybody's memory; no plan is in flight."""
        entries = [*self.decode.entries, *self.paused.values(), *self.prefill.values()]
        self.leaving.drops += [self.evict(entry, now) for entry in entries]

    def forget_prefixes(self) -> bool:
        """Give up all cached blocks; False, and nothing done, while somebody holds any."""
        if self.ledger.used:
            return False
        self.ledger.forget_idle()
        return True

    def _forget_swapped(self, entry: Entry) -> None:
        self.swapped -= entry.swapped
        entry.swapped = 0

    def sampled(self, entries: Iterable[Entry]) -> list[Entry]:
        """Their last chunks were planned; returns those whose token is their last, by the cap."""
        prefill, number, ticks = self.prefill, self.number, self.decode.ticks
        capped, decoding = [], []
        for entry in entries:
            request = entry.request
            del prefill[request.id]
            generated = entry.generated + 1
            entry.generated = entry.sampled_as = generated
            entry.base = generated - ticks
            entry.sampled_in = number
            if self._enforce_caps and generated >= request.cap:
                capped.append(entry)
            else:
                entry.move(State.DECODE)
                decoding.append(entry)
        self.decode.join(decoding)
        return capped

    def pause(self, entry: Entry, latest_at: float) -> None:
        """A decoding request keeps its memory and gets no token for now."""
        self.decode.leave(entry)
        entry.last_plan = self.number
        entry.latest_at = latest_at
        if entry.first_at is None:
            entry.first_at = latest_at
        self.paused[entry.request.id] = entry

    def resume(self, entry: Entry) -> None:
        """A paused request decodes again, unless its last token is still in flight."""
        if entry.last_plan > self.confirmed.number:
            return
        del self.paused[entry.request.id]
        # Ticks in which it sat out may be confirmed later.
        entry.floor = entry.generated
        entry.base = entry.generated - self.decode.ticks
        self.decode.join((entry,))

    def drain(self, entry: Entry) -> None:
        """A request's last token is planned."""
        entry.last_plan = self.number
        entry.move(State.DRAINING)
        self.draining[entry.request.id] = entry
        self.reserved -= entry.most_blocks

    def end(
        self,
        entry: Entry,
        reason: FinishReason,
        output_tokens: int,
        detail: str = "",
        keys: tuple[PrefixKey, ...] = (),
    ) -> Ended:
        """End a request; its memory is given back once no plan in flight names it.

        ``keys`` name its full blocks, to leave behind as prefix cache.
        """
        request_id = entry.request.id
        if entry.state in {State.PREFILL, State.DECODE}:
            self._stop_running(entry)
        elif entry.state is State.DRAINING:
            del self.draining[request_id]
        else:
            self.queue.remove(entry)
            self._forget_swapped(entry)
        entry.move(State.ENDED)
        del self.entries[request_id]
        ended = Ended(request_id, reason, output_tokens, entry.evictions, detail)
        self.leaving.ended.append(ended)
        self.leaving.ids.add(request_id)
        if entry.last_plan > self.confirmed.number:
            self.leaving.lingering[request_id] = (entry, keys)
        else:
            self._release(entry, keys)
        return ended

    def demote(self, entry: Entry) -> None:
        """From now on everyone else is considered before it."""
        if entry.state in {State.WAITING, State.EVICTED}:
            self.queue.remove(entry)
            entry.demoted = True
            self.queue.push(entry)
        entry.demoted = True

    def missed(self, entry: Entry, detail: str) -> Ended | None:
        """Act on a promise that can no longer be kept, as the request asked."""
        if entry.request.on_miss is OnMiss.EXPIRE:
            return self.end(entry, FinishReason.EXPIRED, self.output_tokens(entry), detail)
        self.demote(entry)
        return None

    def output_tokens(self, entry: Entry) -> int:
        """Output tokens in confirmed plans."""
        if entry.sampled_in > self.confirmed.number:
            return entry.sampled_as - 1
        generated = entry.generated
        if entry.request.id in self.decode:
            generated = self.decode.generated(entry)
        if not entry.sampled_in:
            return generated
        return max(entry.floor, min(generated, entry.base + self.confirmed.tick))

    def release_confirmed(self) -> None:
        """Release those whom no plan in flight names any more."""
        lingering = self.leaving.lingering
        done = [
            request_id
            for request_id, (entry, _) in lingering.items()
            if entry.last_plan <= self.confirmed.number
        ]
        for request_id in done:
            self._release(*lingering.pop(request_id))
        if done:  # each had a place in the batch, if no memory any more
            self.releases += 1

    def view(self, now: float) -> Snapshot:
        """What policies may see."""
        ledger, decoding = self.ledger, len(self.decode)
        running = decoding + len(self.prefill) + len(self.paused)
        overlap = 2 * (self.capabilities.depth - 1)
        # In the order of its fields: by name costs twice as much, in every step.
        return Snapshot(
            now, self.number + 1, ledger.capacity, ledger.block_size, ledger.used, ledger.common,
            self._lingering_blocks(), overlap, len(self.queue), running, decoding,
            self.reserved, self._enforce_caps, self.columns,
        )  # fmt: skip

    def columns(self, count: int | None = None) -> Columns:
        """The first ``count`` running requests: those that decode, the paused, those in prefill."""
        seq, prompt, generated, cap = self.decode.columns()
        ids = self.decode.ids
        rows = [*self.paused.values(), *self.prefill.values()]
        if count is not None:
            rows = rows[: max(0, count - len(ids))]
        shared = lag = nothing(len(ids) + len(rows))
        if rows:
            more = np.array(
                [(e.seq, e.request.prompt_tokens, e.generated, e.request.cap) for e in rows],
                dtype=np.int64,
            )
            joined = np.concatenate(((seq, prompt, generated, cap), more.T), axis=1)
            joined.flags.writeable = False
            seq, prompt, generated, cap = joined
            lag = np.zeros(len(shared), dtype=np.int64)
            per_step = self.prefill_per_step
            lag[len(ids) :] = [
                0 if e.state is State.DECODE else -(-(e.total - e.computed) // per_step)
                for e in rows
            ]
            lag.flags.writeable = False
            ids = (*ids, *(e.request.id for e in rows))
        if self.ledger.common:
            holders = [*self.decode.entries, *rows]
            common = [entry.holding.common for entry in holders]
            shared = np.array(common, dtype=np.int64) * self.ledger.block_size
            shared.flags.writeable = False
        return Columns(ids, seq, prompt, generated, cap, shared, lag)

    def check(self) -> None:
        """Raise AssertionError if the books contradict themselves."""
        self.ledger.check()
        assert self.swapped == sum(entry.swapped for entry in self.entries.values())
        assert self.swapped <= self.capabilities.swap_tokens
        live = len(self.queue) + self.running + len(self.draining)
        assert live == len(self.entries), f"{live} requests are somewhere, of {len(self.entries)}"
        if not self.entries and not self.leaving.lingering:
            assert self.ledger.used == 0, f"{self.ledger.used} KV blocks are held by nobody"

    def _stop_running(self, entry: Entry) -> None:
        self.reserved -= entry.most_blocks
        if entry.request.id in self.decode:
            self.decode.leave(entry)
            entry.last_plan = self.number
        elif entry.state is State.DECODE:
            del self.paused[entry.request.id]
        else:
            del self.prefill[entry.request.id]

    def _release(self, entry: Entry, keys: tuple[PrefixKey, ...]) -> None:
        holding = entry.holding
        if not (holding.private or holding.keys):
            self.leaving.forgotten.append(entry.request.id)
            return
        left = tuple(
            (index, key) for index, key in enumerate(keys) if self.ledger.publish(holding, key)
        )
        self.ledger.give_back(holding)
        self.releases += 1
        self.leaving.drops.append(Drop(entry.request.id, final=True, publish=left))

    def _lingering_blocks(self) -> int:
        if not self.draining and not self.leaving.lingering:
            return 0
        ended = [entry for entry, _ in self.leaving.lingering.values()]
        return sum(
            entry.holding.private + entry.holding.sole
            for entry in (*self.draining.values(), *ended)
        )
