"""Drives a real scheduler over a scripted engine, watching everything it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from penstock.core.engine import Ticket, Work
from penstock.core.memory import prefix_keys
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime
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
from penstock.testing import ScriptedEngine


@dataclass
class Clock:
    """A clock that moves when told."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Job:
    """A request to be: its prompt, its cap, its true length."""

    prompt: tuple[int, ...]
    cap: int
    length: int
    arrival_step: int = 0
    cancel_step: int | None = None
    fail_step: int | None = None
    priority: int = 0
    on_miss: OnMiss = OnMiss.KEEP
    ttft: float | None = None
    tpot: float | None = None
    gap: float | None = None
    e2e: float | None = None

    @property
    def work(self) -> Work:
        """What the engine knows about it."""
        return Work(self.prompt, trace_length=self.length)

    @property
    def slo(self) -> SLO:
        """What it was promised."""
        return SLO(ttft=self.ttft, tpot=self.tpot, gap=self.gap, e2e=self.e2e)


class Recorder(ScriptedEngine):
    """A scripted engine that keeps every plan, and gives up whom the test names in ``fail``."""

    def __init__(self, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self.plans: list[StepPlan] = []
        self.fail: set[RequestId] = set()

    def submit(self, plan: StepPlan) -> Ticket:
        self.plans.append(plan)
        return super().submit(plan)

    def collect(self, ticket: Ticket) -> StepResult:
        result = super().collect(ticket)
        failed = dict.fromkeys(sorted(self.fail & result.tokens.keys()), "told to")
        self.fail -= failed.keys()
        return result._replace(
            tokens={key: value for key, value in result.tokens.items() if key not in failed},
            stopped={key: value for key, value in result.stopped.items() if key not in failed},
            failed=failed,
        )


@dataclass
class Outcome:
    """What came of a run."""

    engine: Recorder
    scheduler: Scheduler
    texts: dict[RequestId, list[int]] = field(default_factory=dict)
    ended: dict[RequestId, Ended] = field(default_factory=dict)
    order: list[RequestId] = field(default_factory=list)
    first_token: dict[RequestId, float] = field(default_factory=dict)
    peak_used: int = 0


def run(
    jobs: Sequence[Job],
    capabilities: Capabilities,
    policy: Policy,
    *,
    max_steps: int = 200_000,
    watch: Callable[[Runtime], None] | None = None,
) -> Outcome:
    """Run jobs to the end, checking the books after every step."""
    engine = Recorder(capabilities)
    scheduler = Scheduler(capabilities, policy)
    clock = Clock()
    runtime = Runtime(scheduler, engine, clock)
    outcome = Outcome(engine, scheduler, texts={str(i): [] for i in range(len(jobs))})
    pending = sorted(range(len(jobs)), key=lambda i: (jobs[i].arrival_step, i))
    for step in range(max_steps):
        while pending and jobs[pending[0]].arrival_step <= step:
            index = pending.pop(0)
            runtime.add(request(str(index), jobs[index], capabilities, clock.now), jobs[index].work)
        for index, job in enumerate(jobs):
            if job.cancel_step == step:
                runtime.cancel(str(index))
            if job.fail_step == step:
                engine.fail.add(str(index))
        output = runtime.step()
        scheduler.check()
        stats = scheduler.stats(clock.now)
        assert stats.kv_used <= stats.kv_blocks
        outcome.peak_used = max(outcome.peak_used, stats.kv_used)
        if watch is not None:
            watch(runtime)
        if output is None and not pending:
            break
        if output is None:
            continue
        clock.now += output.seconds
        for request_id, token in output.tokens.items():
            assert request_id not in outcome.ended, "a token after the end"
            outcome.texts[request_id].append(token.id)
            outcome.first_token.setdefault(request_id, clock.now)
        for end in output.ended:
            assert end.id not in outcome.ended, "ended twice"
            outcome.ended[end.id] = end
            outcome.order.append(end.id)
    else:
        msg = f"still running after {max_steps} steps"
        raise AssertionError(msg)
    return outcome


def request(name: RequestId, job: Job, capabilities: Capabilities, arrival: float) -> Request:
    """The job as the scheduler sees it."""
    keys: tuple[PrefixKey, ...] = ()
    if capabilities.prefix_cache:
        keys = prefix_keys(job.prompt, capabilities.block_size)
    return Request(
        name,
        len(job.prompt),
        job.cap,
        arrival,
        slo=job.slo,
        priority=job.priority,
        on_miss=job.on_miss,
        prefix=keys,
    )


def result(plan: StepPlan, *, stopped: Sequence[str] = ()) -> StepResult:
    """A hand-made result without tokens."""
    return StepResult(plan.number, 0.0, {}, dict.fromkeys(stopped, ()))


def policy(name: str, **overrides: float | None) -> Policy:
    """A preset's policy with a fixed seed."""
    return presets.build(name, seed=1, **overrides)  # type: ignore[arg-type]


CAPABILITIES = Capabilities(
    kv_blocks=64, block_size=4, max_batch=16, max_step_tokens=32, max_request_tokens=200
)


def capabilities(**changes: int) -> Capabilities:
    """The usual test machine, with changes."""
    return replace(CAPABILITIES, **changes)  # type: ignore[arg-type]
