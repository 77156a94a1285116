"""What happened in a simulated run, step by step, for reports and traces.

Problem: a summary says that a run went wrong, not when or why.
Rule: a watcher writes down each step and each start, first token and eviction.  Now and then it
forecasts the peak of memory as Past-Future does (arXiv 2507.10150), whatever the policy, from the
lengths that have ended so far, and works out the true peak of the same requests from their true
lengths, so that the forecast can be drawn over what happened.
Limits: the forecast's draws are its own, so that those of the policy stay as they are; it is the
same distribution, not the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from penstock.bench.workload import Floats, Workload
from penstock.core.forecast.lengths import LengthHistory
from penstock.core.forecast.occupancy import peak
from penstock.core.policies.admit.past_future import PastFuture
from penstock.core.policies.base import Policy, SharePolicy, Split
from penstock.core.scheduler import Scheduler
from penstock.core.snapshot import Snapshot
from penstock.core.types import FinishReason, RequestId
from penstock.sim.execute import simulate_spec
from penstock.sim.run import Run, Seen
from penstock.sim.sources import first_try
from penstock.sim.spec import RunSpec, policy_of
from penstock.sim.study import COLD_START

_SCENARIOS = 10
_SAMPLES = 300  # forecasts over a run, about
_WINDOW = 1000  # past lengths, as in the Past-Future paper


class Step(NamedTuple):
    """A step, or a stretch of ``steps`` in which nothing changed.

    Attributes:
        began, ended: in seconds.
        blocks, blocks_after: KV blocks held in its first and in its last step.
        running, waiting: requests, when it had ended.
        decoding: requests that decoded.
        prefill: prompt tokens computed.
    """

    began: float
    ended: float
    blocks: float
    blocks_after: float
    running: int
    waiting: int
    decoding: int
    prefill: int
    steps: int


class Forecast(NamedTuple):
    """The peak of KV blocks that the running requests will need, seen from ``at``.

    ``low``, ``middle``, ``high`` are the 10th, 50th and 90th percentile of the forecast's
    scenarios; ``true`` is what they will need.
    """

    at: float
    low: float
    middle: float
    high: float
    true: float


class Residency(NamedTuple):
    """A stay of a request in KV memory, from its start to its end or eviction, in seconds.

    ``first`` is when its prompt, or what it had to compute again, was done; None if it never was.
    ``waited`` is when it began to wait for this start.
    """

    id: RequestId
    waited: float
    start: float
    first: float | None
    end: float
    evicted: bool


@dataclass(slots=True)
class Observation:
    """One instance's run.

    Attributes:
        blocks: KV blocks there are.
        forecasts: empty where several instances are simulated.
        starts, firsts, evictions: (seconds, request).
    """

    blocks: int
    steps: list[Step] = field(default_factory=list)
    forecasts: list[Forecast] = field(default_factory=list)
    starts: list[tuple[float, RequestId]] = field(default_factory=list)
    firsts: list[tuple[float, RequestId]] = field(default_factory=list)
    evictions: list[tuple[float, RequestId]] = field(default_factory=list)

    def residencies(self, run: Run) -> list[Residency]:
        """Every stay in memory, in order of its start."""
        starts, firsts, evictions = map(_by_id, (self.starts, self.firsts, self.evictions))
        found = []
        for record in run.records:
            name = record.job.id
            ends = [*evictions.get(name, ()), record.at]
            waited, samples = record.job.arrival, firsts.get(name, [])[::-1]
            for number, start in enumerate(starts.get(name, ())):
                end = ends[number]
                first = samples.pop() if samples and samples[-1] <= end else None
                found.append(Residency(name, waited, start, first, end, number < len(ends) - 1))
                waited = end
        return sorted(found, key=lambda stay: stay.start)

    def waits(self, run: Run) -> list[tuple[float, float]]:
        """From when to when somebody waited, in seconds: before each start, or in vain."""
        waits = [(stay.waited, stay.start) for stay in self.residencies(run)]
        started = {name for _, name in self.starts}
        waits += [(r.job.arrival, r.at) for r in run.records if r.job.id not in started]
        return [wait for wait in waits if wait[1] > wait[0]]

    def queue_age(self, run: Run, times: Floats) -> Floats:
        """How long the request that waits longest has waited, at rising times; 0 if none does."""
        oldest = times.astype(float)
        for begin, end in self.waits(run):
            here = slice(*np.searchsorted(times, (begin, end)))
            np.minimum(oldest[here], begin, out=oldest[here])
        age: Floats = times - oldest
        return age


def observed(spec: RunSpec, workload: Workload) -> tuple[list[Run], list[Observation]]:
    """Simulate, and watch: as :func:`penstock.sim.spec.simulate_spec`, an observation per run.

    Raises:
        ValueError: it cannot be simulated.
    """
    watcher = _Watcher(spec, workload)
    policy = None
    if spec.instances == 1 and not spec.pooled:
        policy = policy_of(spec)
        policy = replace(policy, share=_Looking(policy.share, watcher.look))
        watcher.learn_from(policy)
    runs = simulate_spec(spec, workload, policy=policy, watch=watcher.see)
    return runs, watcher.observations


class _Watcher:
    def __init__(self, spec: RunSpec, workload: Workload) -> None:
        assert workload.output is not None
        self.observations: list[Observation] = []
        self._cap = None if spec.steps_only else spec.cap
        self._lengths = workload.output.tolist()
        self._rng = np.random.default_rng([spec.seed, 7])
        # Where caps do not bind, "as long as the cap allows" is no length.
        self._history = LengthHistory(_WINDOW, COLD_START if spec.steps_only else None)
        self._own_history = True
        self._scheduler: Scheduler | None = None
        self._forecasts: list[Forecast] = []
        # An open loop's length is known about; a closed loop's is not, so thin as it goes on.
        until = 0.0 if workload.arrival is None else float(workload.arrival[-1]) / spec.speed
        self._every = until / _SAMPLES
        self._next = 0.0

    def learn_from(self, policy: Policy) -> None:
        """Use the past of a policy that keeps one."""
        if isinstance(policy.admit, PastFuture):
            self._history, self._own_history = policy.admit.history, False

    def see(self, seen: Seen) -> None:
        """A step has run."""
        if seen.scheduler is not self._scheduler:
            self._scheduler = seen.scheduler
            blocks = seen.scheduler.capabilities.kv_blocks
            self.observations.append(Observation(blocks, forecasts=self._forecasts))
        now, plan, kept = seen.now, seen.plan, self.observations[-1]
        kept.starts.extend((seen.began, start.id) for start in plan.starts)
        kept.firsts.extend((now, chunk.id) for chunk in plan.chunks if chunk.samples)
        kept.evictions.extend((seen.began, drop.id) for drop in plan.drops if not drop.final)
        stats, steps, decoding = seen.scheduler.stats(now), seen.output.steps, len(plan.decode)
        held = seen.scheduler.step_blocks
        grown = held + decoding * max(0, steps - 1) / stats.block_size
        if decoding or plan.chunks:
            prefill = sum(chunk.tokens for chunk in plan.chunks)
            running, waiting = stats.running, stats.waiting
            kept.steps.append(
                Step(seen.began, now, held, grown, running, waiting, decoding, prefill, steps)
            )
        if self._own_history:
            for ended in seen.output.ended:
                if ended.reason in {FinishReason.STOP, FinishReason.LENGTH}:
                    self._history.observe(ended.output_tokens)

    def look(self, view: Snapshot) -> None:
        """A plan is about to be made: forecast, if it is time."""
        if view.now < self._next or not view.running:
            return
        columns = view.columns
        generated, lag = columns.generated, columns.lag
        uniform = self._rng.random((_SCENARIOS, len(columns)))
        drawn = self._history.draw_running(uniform, generated, columns.cap, binding=view.caps_bind)
        steps = np.maximum(0, drawn - (generated + 1)) + lag
        peaks = [peak(columns.tokens, row, view.block_size) for row in steps]
        true = np.array([self._lengths[int(first_try(name))] for name in columns.ids])
        if self._cap is not None:
            true = np.minimum(true, self._cap)
        left = np.maximum(0, true - (generated + 1)) + lag
        low, middle, high = np.percentile(peaks, (10, 50, 90)).tolist()
        happens = peak(columns.tokens, left, view.block_size)
        self._forecasts.append(Forecast(view.now, low, middle, high, happens))
        self._next = view.now + self._every
        if len(self._forecasts) > 2 * _SAMPLES:
            del self._forecasts[::2]
            span = view.now - self._forecasts[0].at
            self._every = max(self._every, span / _SAMPLES)


@dataclass(frozen=True, slots=True)
class _Looking:
    """A share policy's answers, after a look at what it is shown before every plan."""

    share: SharePolicy
    look: Callable[[Snapshot], None]

    @property
    def steady(self) -> bool:
        """The policy's."""
        return self.share.steady

    def split(self, view: Snapshot, max_step_tokens: int) -> Split:
        """The policy's."""
        self.look(view)
        return self.share.split(view, max_step_tokens)


def _by_id(events: Iterable[tuple[float, RequestId]]) -> dict[RequestId, list[float]]:
    found: dict[RequestId, list[float]] = {}
    for at, name in events:
        found.setdefault(name, []).append(at)
    return found
