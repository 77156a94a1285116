"""Several simulated instances behind the production dispatcher, on one virtual clock.

Each instance has the production scheduler and a clock of its own, which stands at the end of its
last step.  The next thing that happens anywhere is done next: a step or a stretch of steps ends,
requests come, the pool is due.  A stretch is cut short, at the end of a step, when its instance is
sent something meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from statistics import mean, pstdev

from penstock.core.dispatcher import Batch, Dispatcher
from penstock.core.engine import Work
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Ended, Request, RequestId
from penstock.sim.clock import VirtualClock
from penstock.sim.engine import SimEngine
from penstock.sim.run import Job, Record, Run, Source, no_collections
from penstock.sim.ticks import TickTimes
from penstock.sim.track import Track


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
        batches: requests of each static batch; empty if it pads nothing.
        pad_tokens, invalid_tokens: see :class:`penstock.sim.padding.Rectangle`.
    """

    completed_at: float
    busy: float
    ticks: TickTimes
    steps: int
    memory: float
    evictions: int
    cached_tokens: int
    batches: list[int]
    pad_tokens: int
    invalid_tokens: int

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
    """

    records: list[Record]
    slices: list[int]
    batches: int
    early: int
    moves: int
    instances: list[InstanceRun]
    seconds: float

    def runs(self) -> list[Run]:
        """A run per instance; all records are the first one's."""
        return [
            Run(
                [] if number else self.records, each.ticks, self.seconds, each.steps, each.memory,
                each.evictions, each.cached_tokens,
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
            "busy_std_s": pstdev(each.busy for each in self.instances),
            **(padded if sizes else {}),
        }


@dataclass(slots=True, eq=False)
class _Instance:
    number: int
    engine: SimEngine
    runtime: Runtime
    clock: VirtualClock
    ends_at: float = math.inf
    busy: float = 0.0
    steps: int = 0
    stays: dict[RequestId, Track] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Story:
    """A job and its stays at instances so far."""

    job: Job
    tracks: list[Track] = field(default_factory=list)
    evictions: int = 0


@dataclass(slots=True, eq=False)
class _BatchState:
    left: int
    reached_end: bool = False


def run_cluster(
    source: Source,
    capabilities: Capabilities,
    instances: int,
    make_policy: Callable[[int], Policy],
    latency: LatencyModel,
    dispatcher: Dispatcher,
    *,
    padded: bool = False,
) -> ClusterRun:
    """Simulate until the source has no more jobs and all have ended.

    Args:
        capabilities: of each instance.
        make_policy: makes the policy of an instance.
        dispatcher: without instances.
        padded: instances run static batches as rectangles.
    """
    with no_collections():
        return _Cluster(
            source, capabilities, instances, make_policy, latency, dispatcher, padded=padded
        ).run()


class _Cluster:
    def __init__(
        self,
        source: Source,
        capabilities: Capabilities,
        instances: int,
        make_policy: Callable[[int], Policy],
        latency: LatencyModel,
        dispatcher: Dispatcher,
        *,
        padded: bool,
    ) -> None:
        self._source = source
        self._dispatcher = dispatcher
        self._instances: list[_Instance] = []
        for number in range(instances):
            clock = VirtualClock()
            engine = SimEngine(capabilities, latency, clock, padded=padded)
            scheduler = Scheduler(engine.capabilities, make_policy(number))
            runtime = Runtime(scheduler, engine, clock)
            self._instances.append(_Instance(number, engine, runtime, clock))
            dispatcher.join(number, capabilities.kv_tokens)
        self._stories: dict[RequestId, _Story] = {}
        self._batch_of: dict[RequestId, _BatchState] = {}
        self._ends: list[tuple[float, int]] = []
        # Instances without a step in flight that may have something to do.
        self._idle: dict[int, None] = {}
        self._records: list[Record] = []
        self._slices: list[int] = []
        self._batches = self._early = self._moves = 0

    def run(self) -> ClusterRun:
        now = 0.0
        while True:
            for job in self._source.due(now):
                self._stories[job.id] = _Story(job)
                self._dispatcher.add(_request(job), now)
            if min(self._dispatcher.due, self._dispatcher.move_due) <= now:
                if self._dispatcher.policy.needs_progress:
                    self._tell_progress(now)
                self._move(now)
                self._send(self._dispatcher.dispatch(now), now)
            for number in self._idle:
                self._begin(self._instances[number], now)
            self._idle.clear()
            arrival = self._source.next_arrival()
            times = (self._next_end(), self._dispatcher.due, self._dispatcher.move_due)
            upcoming = min(times) if arrival is None else min(*times, arrival)
            if upcoming == math.inf:
                break
            now = max(now, upcoming)
            self._finish_steps(now)
        done = [self._summary(instance) for instance in self._instances]
        return ClusterRun(
            self._records, self._slices, self._batches, self._early, self._moves, done, now
        )

    def _next_end(self) -> float:
        ends = self._ends
        while ends and self._instances[ends[0][1]].ends_at != ends[0][0]:
            heappop(ends)
        return ends[0][0] if ends else math.inf

    def _finish_steps(self, now: float) -> None:
        while self._next_end() <= now:
            instance = self._instances[heappop(self._ends)[1]]
            instance.ends_at = math.inf
            began = instance.clock.now
            output = instance.runtime.finish()
            instance.busy += instance.clock.now - began
            if output is not None:
                instance.steps += output.steps if output.seconds else 0
                for ended in output.ended:
                    self._slice_ended(instance, ended, now)
            self._idle[instance.number] = None

    def _begin(self, instance: _Instance, now: float) -> None:
        instance.clock.now = max(instance.clock.now, now)
        if instance.runtime.begin():
            instance.ends_at = instance.engine.ends_at
            heappush(self._ends, (instance.ends_at, instance.number))

    def _send(self, batches: list[Batch], now: float) -> None:
        for batch in batches:
            self._batches += 1
            state = _BatchState(len(batch.requests))
            instance = self._instances[batch.instance]
            for request in batch.requests:
                self._open(instance, request)
                self._batch_of[request.id] = state
            self._interrupt(instance, now)

    def _move(self, now: float) -> None:
        if self._dispatcher.move_due > now:
            return
        for number, slice_id in self._dispatcher.moves(now):
            self._moves += 1
            instance = self._instances[number]
            instance.runtime.cancel(slice_id)
            self._interrupt(instance, now)

    def _interrupt(self, instance: _Instance, now: float) -> None:
        """Let an instance see what it was sent, after the step that it is in."""
        if instance.ends_at == math.inf:
            self._idle[instance.number] = None
            return
        instance.engine.cut(now)
        if instance.engine.ends_at != instance.ends_at:
            instance.ends_at = instance.engine.ends_at
            heappush(self._ends, (instance.ends_at, instance.number))

    def _tell_progress(self, now: float) -> None:
        for instance in self._instances:
            for slice_id, track in instance.stays.items():
                self._dispatcher.progress(slice_id, instance.engine.generated(track, now))

    def _open(self, instance: _Instance, request: Request) -> None:
        whole = self._dispatcher.whole(request.id)
        assert whole is not None
        story = self._stories[whole]
        job = story.job
        work = Work(range(job.prompt), trace_length=job.output, generated=range(request.generated))
        instance.runtime.add(request, work)
        track = instance.engine.track(request.id)
        instance.stays[request.id] = track
        story.tracks.append(track)

    def _slice_ended(self, instance: _Instance, ended: Ended, now: float) -> None:
        track = instance.stays.pop(ended.id)
        instance.engine.settle(track)
        whole = self._dispatcher.whole(ended.id)
        assert whole is not None
        story = self._stories[whole]
        story.evictions += ended.evictions
        done = self._dispatcher.ended(ended.id, ended.output_tokens, ended.reason, now)
        self._count(ended, goes_on=done is None)
        if done is None:
            return
        del self._stories[whole]
        self._slices.append(len(story.tracks))
        ended = ended._replace(id=whole, evictions=story.evictions)
        record = Record(story.job, ended, now, _merged(story.tracks))
        self._records.append(record)
        self._source.ended(record, now)

    def _count(self, ended: Ended, *, goes_on: bool) -> None:
        state = self._batch_of.pop(ended.id)
        state.left -= 1
        state.reached_end |= goes_on
        if not state.left and not state.reached_end:
            self._early += 1

    def _summary(self, instance: _Instance) -> InstanceRun:
        scheduler, ticks = instance.runtime.scheduler, instance.engine.ticks
        blocks = scheduler.capabilities.kv_blocks
        memory = scheduler.block_steps / ticks.count / blocks if ticks.count else 0.0
        box = instance.engine.rectangle
        return InstanceRun(
            completed_at=instance.clock.now,
            busy=instance.busy,
            ticks=ticks,
            steps=instance.steps,
            memory=memory,
            evictions=scheduler.evictions,
            cached_tokens=instance.engine.cached_tokens,
            batches=box.batches if box else [],
            pad_tokens=box.pad_tokens if box else 0,
            invalid_tokens=box.invalid_tokens if box else 0,
        )


def _request(job: Job) -> Request:
    return Request(
        job.id, job.prompt, job.cap, job.arrival, job.slo, job.slo_class, job.priority,
        job.on_miss, job.prefix,
    )  # fmt: skip


def _merged(tracks: list[Track]) -> Track:
    """The stays of a request as one; without the times of its single tokens."""
    first = tracks[0]
    if len(tracks) == 1:
        return first
    whole = Track(first.id, first.prompt, first.length, tracks[-1].generated)
    for track in tracks:
        if track.first_at is None:
            continue
        gaps = [gap for gap in (whole.gap, track.gap) if gap is not None]
        if whole.last_at is None:
            whole.first_at = track.first_at
        else:
            gaps.append(track.first_at - whole.last_at)
        whole.gap = max(gaps, default=None)
        whole.last_at = track.last_at
    return whole
