"""KV memory as the scheduler sees it: counted, never placed.

Blocks are counted in three piles that never exceed the capacity together:
*private* blocks of one request, *shared* blocks of the prefix cache that some
request is using, and *idle* blocks of the prefix cache that nobody uses.  Idle
blocks are given up, least recently used first, whenever someone needs room,
so for every decision they count as free.  Which physical block is which is the
engine's business (see :class:`penstock.core.engine.Engine`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from penstock.core.types import PrefixKey

_KEY_BYTES = 16


def prefix_keys(
    tokens: Sequence[int], block_size: int, parent: PrefixKey = b""
) -> tuple[PrefixKey, ...]:
    """Content addresses of the full blocks of ``tokens``: each covers all before it.

    A keyed chain of 128-bit BLAKE2b digests, so that two users' prompts cannot
    be made to collide (which would leak one's KV to the other).
    """
    keys = []
    for end in range(block_size, len(tokens) + 1, block_size):
        block = array("q", tokens[end - block_size : end]).tobytes()
        parent = blake2b(block, key=parent, digest_size=_KEY_BYTES).digest()
        keys.append(parent)
    return tuple(keys)


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that ``tokens`` tokens occupy."""
    return -(-tokens // block_size)


class Holding:
    """What one request holds.

    Attributes:
        private: blocks of its own.
        keys: its shared blocks, in the order in which it came by them.
        sole: how many of ``keys`` nobody else holds.
    """

    __slots__ = ("keys", "private", "sole")

    def __init__(self) -> None:
        self.private = 0
        self.keys: list[PrefixKey] = []
        self.sole = 0

    @property
    def common(self) -> int:
        """Blocks it shares with another request right now."""
        return len(self.keys) - self.sole


class Ledger:
    """Counts KV blocks and knows which prefixes are cached.

    Blocks of requests that only grow (one token per step) are counted in bulk by
    :meth:`grow`; their own :class:`Holding` is brought up to date by the caller before
    anything else happens to it.

    Raises:
        MemoryError: a change would exceed the capacity (a scheduler bug).
    """

    __slots__ = (
        "_common",
        "_forgotten",
        "_holders",
        "_idle",
        "_private",
        "_void",
        "block_size",
        "capacity",
    )

    def __init__(self, capacity: int, block_size: int) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self._private = 0
        self._common = 0
        self._holders: dict[PrefixKey, dict[Holding, None]] = {}
        self._idle: OrderedDict[PrefixKey, None] = OrderedDict()
        self._forgotten: list[PrefixKey] = []
        self._void: set[PrefixKey] = set()

    @property
    def common(self) -> int:
        """Blocks that two or more requests hold."""
        return self._common

    @property
    def idle(self) -> int:
        """Cached blocks that nobody holds."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that requests hold, a shared block counted once."""
        return self._private + len(self._holders)

    @property
    def free(self) -> int:
        """Blocks that could be handed out, idle ones included."""
        return self.capacity - self._private - len(self._holders)

    def hits(self, keys: Sequence[PrefixKey], limit: int) -> tuple[int, int]:
        """Look keys up until the first miss.

        Returns:
            how many of the first ``limit`` keys are cached, and how many of those some
            request holds.
        """
        cached = held = 0
        for key in keys[:limit]:
            if key in self._void:
                break
            if key in self._holders:
                held += 1
            elif key not in self._idle:
                break
            cached += 1
        return cached, held

    def take(self, holding: Holding, blocks: int, cached: Sequence[PrefixKey] = ()) -> None:
        """Hand out private blocks, and a share in cached ones."""
        for key in cached:
            holders = self._holders.get(key)
            if holders is None:
                del self._idle[key]
                self._holders[key] = {holding: None}
                holding.sole += 1
            else:
                if len(holders) == 1:
                    next(iter(holders)).sole -= 1
                    self._common += 1
                holders[holding] = None
        if cached:
            holding.keys.extend(cached)
        holding.private += blocks
        self.grow(blocks)

    def grow(self, blocks: int) -> None:
        """Hand out private blocks to requests whose holdings are brought up to date later."""
        self._private += blocks
        over = self._private + len(self._holders) + len(self._idle) - self.capacity
        if over > 0:
            self._reclaim(over)

    def give_back(self, holding: Holding) -> None:
        """Return all it holds; shared blocks that nobody else holds become idle."""
        self._private -= holding.private
        # Deepest first: the least recently used end then loses leaves before their parents.
        for key in reversed(holding.keys):
            holders = self._holders[key]
            del holders[holding]
            if not holders:
                del self._holders[key]
                self._leave(key)
            elif len(holders) == 1:
                next(iter(holders)).sole += 1
                self._common -= 1
        holding.private = holding.sole = 0
        holding.keys.clear()

    def publish(self, holding: Holding, key: PrefixKey) -> bool:
        """Make one of its private blocks shareable; False if such a block is cached already."""
        if key in self._holders or key in self._idle:
            return False
        self._private -= 1
        holding.private -= 1
        holding.keys.append(key)
        holding.sole += 1
        self._holders[key] = {holding: None}
        return True

    def void(self, key: PrefixKey) -> None:
        """A published block was never computed: nobody may begin with it from now on."""
        if key in self._idle:
            del self._idle[key]
            self._forgotten.append(key)
        elif key in self._holders:
            self._void.add(key)

    def forget_idle(self) -> None:
        """Give up every cached block that nobody holds."""
        self._forgotten.extend(self._idle)
        self._idle.clear()

    def take_forgotten(self) -> tuple[PrefixKey, ...]:
        """Idle keys given up since the last call, in order."""
        forgotten = tuple(self._forgotten)
        self._forgotten.clear()
        return forgotten

    def check(self) -> None:
        """Raise AssertionError if the counts contradict each other (when idle, and in tests)."""
        assert self._private >= 0, f"private is {self._private}"
        assert self.used + len(self._idle) <= self.capacity
        assert not self._holders.keys() & self._idle.keys()
        assert self._void <= self._holders.keys()
        assert all(self._holders.values())
        assert self._common == sum(len(holders) > 1 for holders in self._holders.values())

    def _leave(self, key: PrefixKey) -> None:
        """The last holder of a block is gone."""
        if key in self._void:
            self._void.remove(key)
            self._forgotten.append(key)
        else:
            self._idle[key] = None

    def _reclaim(self, over: int) -> None:
        while over > 0:
            if not self._idle:
                msg = f"KV memory exceeded by {over} of {self.capacity} blocks"
                raise MemoryError(msg)
            key, _ = self._idle.popitem(last=False)
            self._forgotten.append(key)
            over -= 1
