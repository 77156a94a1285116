"""What the front knows of each instance, and of all of them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.types import Role
from penstock.server.messages import Gauges, Ready

NOTHING = Gauges(0, 0, 0, 0, 0.0, 0, None)
"""The books of an instance that has not said anything yet."""


@dataclass(slots=True, eq=False)
class Books:
    """One instance.

    Attributes:
        ready: what it can do.
        role: what it is for.
        gauges: its own books, as of its last message.
        unseen: prompt lengths of requests sent there and not in ``gauges`` yet.
        sent: requests sent there.
    """

    ready: Ready
    role: Role = Role.MIXED
    gauges: Gauges = NOTHING
    unseen: deque[int] = field(default_factory=deque)
    sent: int = 0

    def send(self, tokens: int) -> None:
        """A request of so many tokens is on its way there."""
        self.unseen.append(tokens)
        self.sent += 1

    def forget(self) -> None:
        """A request that was on its way there was not taken in."""
        if self.unseen:
            self.unseen.pop()
            self.sent -= 1

    def take(self, gauges: Gauges) -> int:
        """A message came; how many were evicted since the last one."""
        evicted = gauges.evictions - self.gauges.evictions
        self.gauges = gauges
        while len(self.unseen) > self.sent - gauges.received:
            self.unseen.popleft()
        return evicted

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests that wait there or will when they come, and their tokens."""
        gauges, coming = self.gauges, list(self.unseen)
        if not gauges.waiting:
            # Nobody waits, so the first of them start at once.
            del coming[: max(0, self.ready.max_batch - gauges.running)]
        return gauges.waiting + len(coming), gauges.waiting_tokens + sum(coming)


def joint_ready(books: Iterable[Books]) -> Ready:
    """What any of the instances can do for one request, and all of them for many."""
    known = [book.ready for book in books]
    return Ready(
        kv_blocks=min(ready.kv_blocks for ready in known),
        block_size=known[0].block_size,
        max_batch=sum(ready.max_batch for ready in known),
        max_step_tokens=min(ready.max_step_tokens for ready in known),
        max_request_tokens=min(ready.max_request_tokens for ready in known),
    )


def joint_gauges(
    books: Iterable[Books], *, received: int, pooled: int, pooled_tokens: int, evictions: int
) -> Gauges:
    """The books of all: waiting is who waits at an instance, on the way there, or in the pool."""
    known = list(books)
    gauges = [book.gauges for book in known]
    # Who is handed over is admitted twice; how long newcomers wait is the prefill's matter.
    fronts = [book.gauges for book in known if book.role is not Role.DECODE]
    rates = [gauge.rate for gauge in fronts if gauge.rate is not None]
    capacity = sum(book.ready.kv_tokens for book in known)
    used = sum(book.gauges.kv_usage * book.ready.kv_tokens for book in known)
    return Gauges(
        received=received,
        running=sum(gauge.running for gauge in gauges),
        waiting=pooled + sum(book.waiting[0] for book in known),
        waiting_tokens=pooled_tokens + sum(book.waiting[1] for book in known),
        kv_usage=used / capacity if capacity else 0.0,
        evictions=evictions,
        rate=sum(rates) if rates else None,
        host_tokens=sum(gauge.host_tokens for gauge in gauges),
    )
