"""What came of several simulated instances."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, pstdev

from penstock.core.types import Role
from penstock.sim.link import Transfers
from penstock.sim.run import Record, Run
from penstock.sim.ticks import TickTimes


@dataclass(slots=True)
class InstanceRun:
    """What came of one instance.

    Attributes:
        completed_at: when it last had something to do, in seconds.
        busy: seconds in which it computed.
        ticks: when its decode steps ended.
        steps: with work in them.
        memory: mean share of its KV memory in use over decode steps.
        evictions: in all.
        cached_tokens: tokens with which requests began because they were in the prefix cache.
        swapped_tokens: tokens whose KV went to host memory.
        batches: requests of each static batch; empty if it pads nothing.
        pad_tokens, invalid_tokens: see :class:`penstock.sim.padding.Rectangle`.
        role: what it is for.
    """

    completed_at: float
    busy: float
    ticks: TickTimes
    steps: int
    memory: float
    evictions: int
    cached_tokens: int
    swapped_tokens: int
    batches: list[int]
    pad_tokens: int
    invalid_tokens: int
    role: Role = Role.MIXED

    @property
    def decode_steps(self) -> int:
        """Steps in which someone decoded."""
        return self.ticks.count


@dataclass(slots=True)
class ClusterRun:
    """What came of several instances.

    Attributes:
        records: by request, in the order in which they ended.
        slices: stays at an instance of each of these requests.
        batches: sent to instances.
        early: those of them that ended before their slice did, all requests done.
        moves: requests that left an instance for another.
        instances: by number.
        seconds: simulated time.
        transfers: hand-offs between them, if there are roles.
    """

    records: list[Record]
    slices: list[int]
    batches: int
    early: int
    moves: int
    instances: list[InstanceRun]
    seconds: float
    transfers: Transfers | None = None

    def runs(self) -> list[Run]:
        """A run per instance; all records are the first one's."""
        return [
            Run(
                [] if number else self.records, each.ticks, self.seconds, each.steps, each.memory,
                each.evictions, each.cached_tokens, each.swapped_tokens,
            )
            for number, each in enumerate(self.instances)
        ]  # fmt: skip

    def summary(self) -> dict[str, object]:
        """What only several instances, slices or static batches have."""
        count = max(1, len(self.records))
        sizes = [size for each in self.instances for size in each.batches]
        padded = {
            "batch_size": mean(sizes or [0]),
            "pad_tokens": sum(each.pad_tokens for each in self.instances) / count,
            "invalid_tokens": sum(each.invalid_tokens for each in self.instances) / count,
        }
        return {
            "instances": len(self.instances),
            "slices": sum(self.slices) / count,
            "batches": self.batches,
            "moves": self.moves,
            "early_return_ratio": self.early / self.batches if self.batches else None,
            "completion_std_s": pstdev(each.completed_at for each in self.instances),
            "busy_s": [each.busy for each in self.instances],
            "busy_std_s": pstdev(each.busy for each in self.instances),
            **(padded if sizes else {}),
            **self._roles(),
        }

    def _roles(self) -> dict[str, object]:
        """Hand-offs, and the share of the time in which the instances of each role computed."""
        if self.transfers is None:
            return {}
        busy = {
            role.value: mean(each.busy for each in self.instances if each.role is role)
            for role in (Role.PREFILL, Role.DECODE)
        }
        used = {role: seconds / self.seconds for role, seconds in busy.items() if self.seconds}
        return {"utilization": used, "transfers": self.transfers.summary()}
