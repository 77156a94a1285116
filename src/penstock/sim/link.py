"""What it takes to move KV from one simulated instance to another.

Problem: where prefill and decode have instances of their own, every request's KV crosses a link.
Source: DistServe (OSDI '24) and Mooncake, which place by its bandwidth.
Rule: a transfer takes a latency and its bytes over the bandwidth; an instance takes in one transfer
at a time, in the order in which they were begun.
Limits: the sender's side is no bottleneck, and gives its memory back at once: what waits for the
link waits outside of KV memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Link:
    """A kind of link.

    Attributes:
        bytes_per_token: of KV.
        bandwidth: bytes per second into one instance.
        latency: seconds per transfer, on top.

    Raises:
        ValueError: a number is out of range.
    """

    bytes_per_token: int
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_token < 1:
            msg = f"bytes_per_token is {self.bytes_per_token}; it must be at least 1"
            raise ValueError(msg)
        if not self.bandwidth > 0:
            msg = f"bandwidth is {self.bandwidth}; it must be above 0 bytes per second"
            raise ValueError(msg)
        if not 0 <= self.latency < float("inf"):
            msg = f"latency is {self.latency}; it must be 0 seconds or more"
            raise ValueError(msg)

    def seconds(self, tokens: int) -> float:
        """Of one transfer on an idle link."""
        return self.latency + tokens * self.bytes_per_token / self.bandwidth


@dataclass(slots=True)
class Transfers:
    """Transfers into instances, and their sums.

    Attributes:
        count: of hand-offs.
        tokens: of all transfers.
        busy: seconds that transfers took, their latency included.
        waited: seconds for which KV waited for a link that was busy.
    """

    link: Link
    count: int = 0
    tokens: int = 0
    busy: float = 0.0
    waited: float = 0.0
    _free_at: dict[int, float] = field(default_factory=dict)

    def begin(self, instance: int, tokens: int, now: float, *, last: bool = True) -> float:
        """Send so many tokens' KV to an instance; when it will be there, in seconds.

        Args:
            last: nothing follows; a hand-off in parts has one last part.
        """
        start = max(now, self._free_at.get(instance, 0.0))
        seconds = self.link.seconds(tokens)
        self.count += last
        self.tokens += tokens
        self.busy += seconds
        self.waited += start - now
        self._free_at[instance] = start + seconds
        return start + seconds

    def summary(self) -> dict[str, float]:
        """In numbers; ``bandwidth`` is what was reached, in bytes per second."""
        size = self.tokens * self.link.bytes_per_token
        return {
            "hand_offs": self.count,
            "bytes": size,
            "seconds": self.busy,
            "waited_s": self.waited,
            "bandwidth": size / self.busy if self.busy else 0.0,
        }
