"""The scheduler's own record of a request, and the requests that decode in step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from penstock.core.lifecycle import MOVES, IllegalMoveError, State
from penstock.core.memory import Holding, blocks_for
from penstock.core.policies.base import OrderKey
from penstock.core.snapshot import Ints
from penstock.core.types import Request, RequestId


@dataclass(slots=True, eq=False)
class Entry:
    """What the scheduler knows about a request.

    Attributes:
        seq: order of arrival, from 0.
        key: its place in the order.
        generated: output tokens in plans so far; while decoding see :meth:`DecodeSet.generated`.
        base: ``generated`` minus the decode set's ticks, from its last sampled chunk on.
        computed: tokens that have KV, counted while in prefill.
        sampled_in: number of the plan whose chunk sampled last, 0 before the first.
        sampled_as: ``generated`` right after that.
        last_plan: number of the last plan that names it; while it decodes, not kept up to date.
        waited_since: when it last entered the waiting queue.
        most_blocks: blocks for its prompt and its cap.
        swapped: tokens whose KV an eviction left in host memory.
        floor: output tokens that it surely has; kept where it sat out of decode steps.
        first_at: when its first token came, in seconds; None: it has none, or nobody asked.
        latest_at: when its latest token came, while it sits out of decode steps or is evicted;
            about then for one that was evicted before it decoded here.
        place: number of its place in the waiting queue, from 1; 0: it does not wait.
        why: why it is still waiting, if anyone said so.
    """

    request: Request
    seq: int
    key: OrderKey
    waited_since: float
    state: State = State.WAITING
    demoted: bool = False
    generated: int = 0
    base: int = 0
    computed: int = 0
    published: int = 0
    sampled_in: int = 0
    sampled_as: int = 0
    last_plan: int = 0
    evictions: int = 0
    why: str = ""
    most_blocks: int = 0
    swapped: int = 0
    place: int = 0
    floor: int = 0
    first_at: float | None = None
    latest_at: float = 0.0
    holding: Holding = field(default_factory=Holding)

    @property
    def total(self) -> int:
        """Tokens that must have KV before it can yield its next one."""
        return self.request.prompt_tokens + self.generated

    @property
    def imported(self) -> int:
        """Tokens whose KV comes along when it starts."""
        return self.swapped if self.evictions else self.request.computed

    def move(self, state: State) -> None:
        """Change state; raises on an illegal move."""
        if state not in MOVES[self.state]:
            raise IllegalMoveError(self.request.id, self.state, state)
        self.state = state


class DecodeSet:
    """Requests that each get one token per tick, kept so that a tick costs O(1).

    A tick touches no request.  Each one's token count is ``base + ticks``; the blocks that a
    tick needs are read from a count per residue class (a request enters a new block when
    its KV length is a multiple of the block size, and all lengths advance together); requests
    that reach their cap wait in a bucket under the tick at which they do.
    """

    def __init__(self, block_size: int, *, enforce_caps: bool = True) -> None:
        self.ticks = 0
        self._enforce_caps = enforce_caps
        self._block_size = block_size
        self._crossing = [0] * block_size
        self._capped: dict[int, dict[Entry, None]] = {}
        # The ticks that have a bucket, and some that had one.
        self._cap_ticks: list[int] = []
        # One row per member, kept dense: whoever leaves is replaced by the last.
        self._members: list[Entry] = []
        self._names: list[RequestId] = []
        self._row: dict[RequestId, int] = {}
        self._rows = _Rows()
        self._ids: tuple[RequestId, ...] | None = ()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._row

    @property
    def entries(self) -> Sequence[Entry]:
        """The members, in the order of :attr:`ids`."""
        return self._members

    @property
    def ids(self) -> tuple[RequestId, ...]:
        """The members' ids; the same object until someone joins or leaves."""
        if self._ids is None:
            self._ids = tuple(self._names)
        return self._ids

    def generated(self, entry: Entry) -> int:
        """Output tokens a member has, in plans so far."""
        return entry.base + self.ticks

    def growth(self) -> int:
        """Blocks that the next tick needs."""
        return self._crossing[-self.ticks % self._block_size]

    def ticks_within(self, blocks: int) -> int:
        """Ticks that ``blocks`` more blocks suffice for; perhaps not all of them.

        A member enters a new block once in ``block_size`` ticks.
        """
        return blocks // len(self._members) * self._block_size

    def ticks_to_cap(self) -> int | None:
        """Ticks after which the first member reaches its cap; None if no cap is enforced."""
        heap = self._cap_ticks
        while heap:
            if self._capped.get(heap[0]):
                return heap[0] - self.ticks
            self._capped.pop(heappop(heap), None)
        return None

    def coast(self, ticks: int) -> tuple[int, int]:
        """Let ticks pass in which nobody reaches a cap.

        Returns:
            blocks they needed, and the sum over these ticks of the blocks needed so far.
        """
        size = self._block_size
        if size == 1:
            growth = self._crossing[0]
            self.ticks += ticks
            return ticks * growth, growth * ticks * (ticks + 1) // 2
        needed = total = 0
        for first in range(min(size, ticks)):
            growth = self._crossing[-(self.ticks + first) % size]
            # This residue's turn comes at first, first + size, ...; each time for the rest.
            turns = (ticks - 1 - first) // size + 1
            needed += growth * turns
            total += growth * (turns * (ticks - first) - size * turns * (turns - 1) // 2)
        self.ticks += ticks
        return needed, total

    def tick(self) -> list[Entry]:
        """One token for everyone; returns those that reached their cap with it."""
        self.ticks += 1
        heap = self._cap_ticks
        while heap and heap[0] <= self.ticks:
            heappop(heap)
        capped = self._capped.pop(self.ticks, None)
        return list(capped) if capped else []

    def join(self, entries: Sequence[Entry]) -> None:
        """Let requests in whose chunks have just sampled; their ``base`` is set."""
        if not entries:
            return
        names, crossing, size = self._names, self._crossing, self._block_size
        rows: list[int] = []
        for entry in entries:
            request, base = entry.request, entry.base
            prompt, cap = request.prompt_tokens, request.cap
            self._row[request.id] = len(names)
            names.append(request.id)
            rows += (entry.seq, prompt, base, cap)
            crossing[(prompt + base - 1) % size] += 1
            if self._enforce_caps:
                bucket = self._capped.get(cap - base)
                if bucket is None:
                    bucket = self._capped[cap - base] = {}
                    heappush(self._cap_ticks, cap - base)
                bucket[entry] = None
        self._members.extend(entries)
        self._rows.extend(rows)
        self._ids = None

    def leave(self, entry: Entry) -> None:
        """Let a request out and bring its own counts up to date."""
        row = self._row.pop(entry.request.id)
        last, name = self._members.pop(), self._names.pop()
        if last is not entry:
            self._members[row], self._names[row] = last, name
            self._row[name] = row
        self._rows.remove(row)
        self._crossing[(entry.request.prompt_tokens + entry.base - 1) % self._block_size] -= 1
        # Those that a tick has just returned have no bucket any more.
        tick = entry.request.cap - entry.base
        bucket = self._capped.get(tick)
        if bucket is not None:
            bucket.pop(entry, None)
            if not bucket:
                del self._capped[tick]
        entry.generated = entry.base + self.ticks
        entry.computed = entry.request.prompt_tokens + entry.generated - 1
        holding = entry.holding
        holding.private = blocks_for(entry.computed, self._block_size) - len(holding.keys)
        self._ids = None

    def columns(self) -> Sequence[Ints]:
        """(seq, prompt, generated, cap) of the members, in the order of :attr:`ids`."""
        return self._rows.columns(self.ticks)


class _Rows:
    """Rows of four integers: cheap to add and to remove, cheap to copy into arrays."""

    def __init__(self) -> None:
        # Row by row, so that a row comes and goes in one piece.
        self._flat = array("q")

    def extend(self, rows: Sequence[int]) -> None:
        """More rows, one after the other."""
        self._flat.extend(rows)

    def remove(self, row: int) -> None:
        """The last row takes the place of this one."""
        flat = self._flat
        flat[4 * row : 4 * row + 4] = flat[-4:]
        del flat[-4:]

    def columns(self, ticks: int) -> Sequence[Ints]:
        """The four, as arrays that cannot be written to; the third with so many added."""
        # A copy: while an array shares its memory it could not grow.  Bytes cannot be written to.
        flat = np.frombuffer(self._flat.tobytes(), dtype=np.int64)
        generated = flat[2::4] + ticks
        generated.flags.writeable = False
        return flat[0::4], flat[1::4], generated, flat[3::4]
