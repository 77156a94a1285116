"""Several simulated instances behind the production dispatcher, on one virtual clock.

Each instance has the production scheduler and a clock of its own, which stands at the end of its
last step.  The next thing that happens anywhere is done next: a step or a stretch of steps ends,
requests come, the pool is due.  A stretch is cut short, at the end of a step, when its instance is
sent something meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from penstock.core.dispatcher import Batch, Dispatcher
from penstock.core.engine import Work
from penstock.core.forecast.latency.base import LatencyModel
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime, StepOutput
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Ended, FinishReason, Request, RequestId, Role
from penstock.sim.clock import VirtualClock
from penstock.sim.cluster_run import ClusterRun, InstanceRun
from penstock.sim.engine import SimEngine
from penstock.sim.kv import SimKV
from penstock.sim.link import Link, Transfers
from penstock.sim.run import Job, Record, Source, no_collections
from penstock.sim.track import Track

_INSTANT = Link(1, math.inf)


@dataclass(slots=True, eq=False)
class _Instance:
    number: int
    engine: SimEngine
    runtime: Runtime
    clock: VirtualClock
    role: Role
    ends_at: float = math.inf
    busy: float = 0.0
    steps: int = 0
    stays: dict[RequestId, Track] = field(default_factory=dict)
    # Those that leave for another instance after the step that they are in.
    moving: list[RequestId] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Story:
    """A job and its stays at instances so far."""

    job: Job
    tracks: list[Track] = field(default_factory=list)
    evictions: int = 0
    # Tokens whose KV went ahead, and where to.
    ahead: int = 0
    bound: int = -1


@dataclass(slots=True, eq=False)
class _BatchState:
    left: int
    reached_end: bool = False


def run_cluster(
    source: Source,
    capabilities: Capabilities,
    roles: Sequence[Role],
    make_policy: Callable[[int], Policy],
    latency: LatencyModel,
    dispatcher: Dispatcher,
    *,
    padded: bool = False,
    link: Link | None = None,
    stream: bool = False,
    bus: Link | None = None,
) -> ClusterRun:
    """Simulate until the source has no more jobs and all have ended.

    Args:
        capabilities: of each instance.
        roles: of each instance.
        make_policy: makes the policy of an instance.
        dispatcher: without instances.
        padded: instances run static batches as rectangles.
        link: between prefill and decode instances; None: KV takes no time.
        stream: it crosses chunk by chunk, while the prefill goes on.
        bus: of each instance to its host memory, for what is swapped.
    """
    with no_collections():
        return _Cluster(
            source, capabilities, roles, make_policy, latency, dispatcher, padded=padded, link=link,
            stream=stream, bus=bus,
        ).run()  # fmt: skip


class _Cluster:
    def __init__(
        self,
        source: Source,
        capabilities: Capabilities,
        roles: Sequence[Role],
        make_policy: Callable[[int], Policy],
        latency: LatencyModel,
        dispatcher: Dispatcher,
        *,
        padded: bool,
        link: Link | None,
        stream: bool,
        bus: Link | None,
    ) -> None:
        self._source = source
        self._dispatcher = dispatcher
        self._instances: list[_Instance] = []
        for number, role in enumerate(roles):
            clock = VirtualClock()
            engine = SimEngine(capabilities, latency, clock, padded=padded, bus=bus)
            scheduler = Scheduler(engine.capabilities, make_policy(number))
            runtime = Runtime(scheduler, engine, clock)
            self._instances.append(_Instance(number, engine, runtime, clock, role))
            dispatcher.join(number, capabilities.kv_tokens, role)
        disaggregated = any(role is not Role.MIXED for role in roles)
        self._transfers = Transfers(link or _INSTANT) if disaggregated else None
        self._stream = stream
        # (when its KV is there, serial, instance, request)
        self._on_the_way: list[tuple[float, int, int, Request]] = []
        self._stories: dict[RequestId, _Story] = {}
        self._batch_of: dict[RequestId, _BatchState] = {}
        self._ends: list[tuple[float, int]] = []
        # Instances without a step in flight that may have something to do.
        self._idle: dict[int, None] = {}
        self._records: list[Record] = []
        self._slices: list[int] = []
        self._batches = self._early = self._moves = self._serial = 0

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
            self._arrive(now)
            for number in self._idle:
                self._begin(self._instances[number], now)
            self._idle.clear()
            arrival = self._source.next_arrival()
            there = self._on_the_way[0][0] if self._on_the_way else math.inf
            times = (self._next_end(), self._dispatcher.due, self._dispatcher.move_due, there)
            upcoming = min(times) if arrival is None else min(*times, arrival)
            if upcoming == math.inf:
                break
            now = max(now, upcoming)
            self._finish_steps(now)
        done = [self._summary(instance) for instance in self._instances]
        return ClusterRun(
            self._records, self._slices, self._batches, self._early, self._moves, done, now,
            self._transfers,
        )  # fmt: skip

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
            self._deliver(instance, instance.runtime.finish(), now)
            instance.busy += instance.clock.now - began
            if instance.moving:
                self._let_go(instance, now)
            self._idle[instance.number] = None

    def _deliver(self, instance: _Instance, output: StepOutput | None, now: float) -> None:
        if output is None:
            return
        instance.steps += output.steps if output.seconds else 0
        for slice_id, part in output.parts.items():
            self._send_ahead(slice_id, part.tokens, now)
        for ended in output.ended:
            kv = output.kept.get(ended.id) is not None
            self._slice_ended(instance, ended, now, kv=kv)

    def _let_go(self, instance: _Instance, now: float) -> None:
        """End those that move, with the tokens of the step that has just ended."""
        for slice_id in instance.moving:
            instance.runtime.cancel(slice_id)
        instance.moving.clear()
        self._deliver(instance, instance.runtime.finish(), now)

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
                self._batch_of[request.id] = state
                if request.computed and self._transfers:
                    left = request.computed - self._went_ahead(request, batch.instance)
                    at = self._transfers.begin(batch.instance, left, now)
                    self._serial += 1
                    heappush(self._on_the_way, (at, self._serial, batch.instance, request))
                else:
                    self._open(instance, request)
            self._interrupt(instance, now)

    def _send_ahead(self, slice_id: RequestId, tokens: int, now: float) -> None:
        """Part of a prompt's KV sets out while the rest is computed."""
        goes_to, whole = self._dispatcher.bind(slice_id), self._dispatcher.whole(slice_id)
        if goes_to is None or whole is None or self._transfers is None:
            return
        story = self._stories[whole]
        story.ahead = tokens + (story.ahead if story.bound == goes_to else 0)
        story.bound = goes_to
        self._transfers.begin(goes_to, tokens, now, last=False)

    def _went_ahead(self, request: Request, instance: int) -> int:
        """Tokens of a request's KV that are there, or on the way, already."""
        whole = self._dispatcher.whole(request.id)
        assert whole is not None
        story = self._stories[whole]
        ahead, story.ahead = story.ahead, 0
        return ahead if story.bound == instance else 0

    def _arrive(self, now: float) -> None:
        """Requests whose KV has come are there."""
        while self._on_the_way and self._on_the_way[0][0] <= now:
            _, _, number, request = heappop(self._on_the_way)
            instance = self._instances[number]
            self._open(instance, request)
            self._interrupt(instance, now)

    def _move(self, now: float) -> None:
        if self._dispatcher.move_due > now:
            return
        for number, slice_id in self._dispatcher.moves(now):
            instance = self._instances[number]
            instance.moving.append(slice_id)
            if instance.ends_at == math.inf:
                self._let_go(instance, now)
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
        work = Work(
            range(job.prompt),
            trace_length=job.output,
            generated=range(request.generated),
            kv=SimKV(request.computed) if request.computed else None,
            keep_kv=self._dispatcher.hands_over(request.id),
            stream_kv=self._stream,
        )
        instance.runtime.add(request, work)
        track = instance.engine.track(request.id)
        instance.stays[request.id] = track
        story.tracks.append(track)

    def _slice_ended(self, instance: _Instance, ended: Ended, now: float, *, kv: bool) -> None:
        track = instance.stays.pop(ended.id)
        instance.engine.settle(track)
        whole = self._dispatcher.whole(ended.id)
        assert whole is not None
        story = self._stories[whole]
        story.evictions += ended.evictions
        self._moves += ended.reason is FinishReason.CANCELLED
        done = self._dispatcher.ended(ended.id, ended.output_tokens, ended.reason, now, kv=kv)
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
            swapped_tokens=instance.engine.swapped_tokens,
            batches=box.batches if box else [],
            pad_tokens=box.pad_tokens if box else 0,
            invalid_tokens=box.invalid_tokens if box else 0,
            role=instance.role,
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
