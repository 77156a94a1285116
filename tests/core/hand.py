"""A scheduler turned by hand, without an engine: for tests of single situations."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.scheduler import Scheduler
from penstock.core.types import (
    SLO,
    Capabilities,
    Ended,
    OnMiss,
    PrefixKey,
    Request,
    RequestId,
    StepPlan,
    StepResult,
)


class Hand:
    """Plans are confirmed with the ends that the test names; tokens are only counted.

    ``tokens`` counts those confirmed, ``ended`` keeps the ends that were told.
    """

    def __init__(self, capabilities: Capabilities, policy: str | Policy) -> None:
        if isinstance(policy, str):
            policy = presets.build(policy, seed=1)
        self.scheduler = Scheduler(capabilities, policy)
        self.now = 0.0
        self.flight: deque[StepPlan] = deque()
        self.tokens: Counter[RequestId] = Counter()
        self.ended: dict[RequestId, Ended] = {}

    def add(
        self,
        name: RequestId,
        prompt: int,
        cap: int,
        *,
        priority: int = 0,
        slo: SLO | None = None,
        on_miss: OnMiss = OnMiss.KEEP,
        prefix: tuple[PrefixKey, ...] = (),
        true_length: int | None = None,
    ) -> None:
        """A request that arrives now."""
        request = Request(
            name,
            prompt,
            cap,
            self.now,
            slo=slo or SLO(),
            priority=priority,
            on_miss=on_miss,
            prefix=prefix,
        )
        self.scheduler.add(request, true_length)

    def plan(self) -> StepPlan:
        """Plan a step, which must be possible, and leave it in flight."""
        plan = self.scheduler.plan(self.now)
        assert plan is not None, "there is no plan"
        self.flight.append(plan)
        return plan

    def confirm(
        self,
        *,
        stop: Sequence[RequestId] | Mapping[RequestId, tuple[PrefixKey, ...]] = (),
        fail: Sequence[RequestId] = (),
    ) -> frozenset[RequestId]:
        """Confirm the oldest plan; those named in ``stop`` end with it."""
        plan = self.flight.popleft()
        named = [*plan.decode, *(chunk.id for chunk in plan.chunks if chunk.samples)]
        stopped = stop if isinstance(stop, Mapping) else dict.fromkeys(stop, ())
        stale = self.scheduler.confirm(
            StepResult(plan.number, 0.0, {}, stopped, dict.fromkeys(fail, "broken"))
        )
        self.tokens.update(name for name in named if name not in stale)
        self.take_ended()
        self.scheduler.check()
        return stale

    def step(self, *, stop: Sequence[RequestId] = ()) -> StepPlan:
        """Plan and confirm."""
        plan = self.plan()
        self.confirm(stop=stop)
        return plan

    def take_ended(self) -> None:
        """Note the ends that the scheduler tells."""
        for ended in self.scheduler.take_ended():
            assert ended.id not in self.ended, "ended twice"
            self.ended[ended.id] = ended

    def finish(self, *, steps: int = 10_000) -> list[StepPlan]:
        """Step until there is nothing left to do."""
        plans: list[StepPlan] = []
        while self.flight:
            self.confirm()
        while (plan := self.scheduler.plan(self.now)) is not None:
            assert len(plans) < steps, "it does not come to an end"
            plans.append(plan)
            self.flight.append(plan)
            self.confirm()
        self.take_ended()
        stats = self.scheduler.stats(self.now)
        assert (stats.waiting, stats.running, stats.kv_used) == (0, 0, 0)
        return plans
