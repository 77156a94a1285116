"""An engine that computes nothing and knows how long it would have taken.

A decode step in which nobody comes or goes costs O(1): lengths advance by a common tick, ends
wait in a heap under the tick at which they fall, and token times are kept by the stretch.  Where
the step time is affine in the context, a whole stretch of such steps is one sum.
"""

from __future__ import annotations

import math
from dataclasses import replace
from heapq import heappop, heappush
from types import MappingProxyType
from typing import NamedTuple

from penstock.core.engine import Ticket, Work
from penstock.core.forecast.latency.affine import DecodeSteps
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.loads import load_of
from penstock.core.types import Capabilities, Drop, RequestId, StepPlan, StepResult, Token
from penstock.sim.clock import VirtualClock
from penstock.sim.kv import SimKV
from penstock.sim.link import Link
from penstock.sim.padding import Rectangle
from penstock.sim.ticks import TickTimes
from penstock.sim.track import Track

_LONGEST_STRETCH = 1 << 30


class _Running(NamedTuple):
    """A plan that is being carried out: ``steps`` times, the first of which takes ``first``."""

    plan: StepPlan
    began: float
    steps: int
    first: float
    increase: float

    @property
    def seconds(self) -> float:
        steps = self.steps
        return steps * self.first + self.increase * (steps * (steps - 1) // 2)


_NO_TOKENS: MappingProxyType[RequestId, Token] = MappingProxyType({})


class SimEngine:
    """Carries plans out on a virtual clock.

    Requests end by themselves at their ``Work.trace_length``, which must be given.

    Args:
        capabilities: of the machine that is simulated; of depth 1.
        latency: durations of its steps.
        clock: advanced when a step is collected.
        padded: it runs batches as rectangles; for policies with static batches only.
        bus: to host memory, for what is swapped; None: that takes no time.

    Attributes:
        ticks: when decode steps ended.
        plan: the latest one.
        cached_tokens: tokens with which requests began because they were in the prefix cache.
        wake_at: it comes back for a plan after the first step that ends then or later.
        swapped_tokens: tokens whose KV went to host memory.
        rectangle: the static batch that runs, if ``padded``.

    Raises:
        ValueError: the depth is not 1.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        latency: LatencyModel,
        clock: VirtualClock,
        *,
        padded: bool = False,
        bus: Link | None = None,
    ) -> None:
        if capabilities.depth != 1:
            msg = f"capabilities.depth is {capabilities.depth}; a simulated engine has depth 1"
            raise ValueError(msg)
        stretch = 1 if latency.decode_line(1) is None else _LONGEST_STRETCH
        self.capabilities = replace(capabilities, max_repeat=stretch)
        self.ticks = TickTimes()
        self.plan: StepPlan | None = None
        self.cached_tokens = 0
        self.wake_at = math.inf
        self.rectangle = Rectangle() if padded else None
        self._latency = latency
        self._bus = bus
        self.swapped_tokens = 0
        self._clock = clock
        self._tracks: dict[RequestId, Track] = {}
        self._decoding: dict[RequestId, Track] = {}
        self._joining: list[Track] = []
        self._decode: tuple[RequestId, ...] = ()
        self._context = 0
        self._longest = _Longest() if latency.wants_longest else None
        # (tick, serial, track, its base then): stale if the track stopped decoding meanwhile.
        self._ends: list[tuple[int, int, Track, int]] = []
        self._serial = 0
        self._running: _Running | None = None

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take a request in; only the lengths of its payload matter."""
        if work.trace_length is None:
            msg = f"request {request_id}: trace_length is None; the simulator needs a length"
            raise ValueError(msg)
        self._tracks[request_id] = Track(
            request_id, len(work.prompt), work.trace_length, len(work.generated)
        )

    def track(self, request_id: RequestId) -> Track:
        """The tokens of an open request; the object stays of use after its end."""
        return self._tracks[request_id]

    def discard(self, request_id: RequestId) -> None:
        """Forget a request."""
        del self._tracks[request_id]

    def take_kv(
        self, request_id: RequestId, start: int = 0, end: int | None = None
    ) -> SimKV | None:
        """Its size: all tokens but the latest have KV, or those up to the end of a chunk just run.

        The requests of a plan hold what it computed until the next one.
        """
        track = self._tracks.get(request_id)
        if track is None:
            return None
        if end is not None:
            chunks = self.plan.chunks if self.plan else ()
            there = any(c.id == request_id and c.start + c.tokens >= end for c in chunks)
            return SimKV(end - start) if there else None
        if not track.generated:
            return None
        self.settle(track)
        return SimKV(track.prompt + track.generated - 1 - start)

    def settle(self, track: Track) -> None:
        """Bring a track up to date: it had a token in each tick up to now."""
        if track.decodes:
            track.settle(self.ticks)

    def submit(self, plan: StepPlan) -> Ticket:
        """Carry a plan out; its time passes when it is collected."""
        self.plan = plan
        swapped = self._swapped(plan) if self.capabilities.swap_tokens else 0
        for drop in plan.drops:
            self._drop(drop)
        if self.capabilities.prefix_cache:
            self._count_cached(plan)
        if self.rectangle:
            self.rectangle.enter(plan)
        if plan.decode:
            self._decode_only(plan.decode)
        began, steps, increase = self._clock.now, 1, 0.0
        if plan.repeat > 1 and not swapped:
            steps, first, increase = self._stretch(plan, began)
        else:
            first = self._seconds(plan)
        if swapped and self._bus:
            first += self._bus.seconds(swapped)
        self._running = _Running(plan, began, steps, first, increase)
        return Ticket(plan.number)

    @property
    def ends_at(self) -> float:
        """When what was submitted last will have been carried out, in seconds."""
        running = self._running
        assert running is not None
        return running.began + running.seconds

    def generated(self, track: Track, now: float) -> int:
        """Output tokens that an open request has by ``now``, within a stretch too."""
        if not track.decodes:
            return track.generated
        ticks, running = self.ticks.count, self._running
        if running is not None and running.plan.decode and now > running.began:
            until = _steps_until(now - running.began, running.first, running.increase)
            ticks += min(running.steps, until - 1)
        return track.base + ticks

    def cut(self, at: float) -> None:
        """Come back after the first step that ends at ``at`` or later, if that is earlier."""
        running = self._running
        if running is not None and running.steps > 1 and at < running.began + running.seconds:
            steps = _steps_until(at - running.began, running.first, running.increase)
            self._running = running._replace(steps=min(steps, running.steps))

    def collect(self, ticket: Ticket) -> StepResult:
        """Let the time of the step, or of the stretch, pass."""
        running, self._running = self._running, None
        assert running is not None
        plan, steps, seconds = running.plan, running.steps, running.seconds
        assert plan.number == ticket.number
        stopped: dict[RequestId, tuple[bytes, ...]] = {}
        if plan.decode:
            decoding = len(plan.decode)
            self.ticks.append(steps, running.began, running.first, running.increase)
            self._context += decoding * steps
            if self.rectangle:
                self.rectangle.decoded(steps, decoding)
            self._end_reached(stopped)
        if plan.chunks:
            self._sample(plan, running.began + seconds, stopped)
        self._clock.now += seconds
        return StepResult(plan.number, seconds, _NO_TOKENS, stopped, steps=steps)

    def close(self) -> None:
        """Forget everything."""
        self._tracks.clear()
        self._decoding.clear()

    def _seconds(self, plan: StepPlan) -> float:
        """What one run of a plan takes."""
        if not plan.decode and (not plan.chunks or isinstance(self._latency, DecodeSteps)):
            return 0.0
        if self.rectangle and plan.chunks:
            assert not plan.decode, "static batches do not mix prompts and decoding"
            return self._latency.seconds(self.rectangle.prompts(plan))
        decoding, context = self._attended(plan)
        longest = 0
        if self._longest and decoding:
            box, ticks = self.rectangle, self.ticks.count
            longest = box.length if box else self._longest.at(ticks)
        if not plan.chunks:
            return self._latency.seconds(StepLoad(decoding, context, longest=longest))
        spans = ((chunk.start, chunk.tokens) for chunk in plan.chunks)
        return self._latency.seconds(load_of(decoding, context, longest, spans))

    def _count_cached(self, plan: StepPlan) -> None:
        """Prompt tokens found in the prefix cache: once per request, where it is computed."""
        for start in plan.starts:
            track = self._tracks[start.id]
            if not track.started and not start.imported:
                cached = len(start.cached) * self.capabilities.block_size
                self.cached_tokens += min(cached, track.prompt)
            track.started = True

    def _swapped(self, plan: StepPlan) -> int:
        """Tokens whose KV goes to host memory or comes from there, before a plan's step."""
        out = sum([drop.swapped for drop in plan.drops])
        tokens = out
        for start in plan.starts:
            track = self._tracks[start.id]
            tokens += max(0, track.swapped - len(start.cached) * self.capabilities.block_size)
            track.swapped = 0
        for drop in plan.drops:
            self._tracks[drop.id].swapped = drop.swapped
        self.swapped_tokens += out
        return tokens

    def _attended(self, plan: StepPlan) -> tuple[int, int]:
        """Requests that a decode step computes, and the KV tokens that they attend to."""
        if not plan.decode:
            return 0, 0
        if self.rectangle:
            return self.rectangle.rows, self.rectangle.context
        return len(plan.decode), self._context

    def _stretch(self, plan: StepPlan, now: float) -> tuple[int, float, float]:
        """Steps until somebody ends or time is up, seconds of the first, increase per step."""
        decoding, context = self._attended(plan)
        line = self._latency.decode_line(decoding)
        assert line is not None
        first = line[0] + line[1] * context
        increase = line[1] * decoding
        steps = min(plan.repeat, self._next_end() - self.ticks.count)
        left = min(plan.until, self.wake_at) - now
        if left < steps * first + increase * (steps * (steps - 1) // 2):
            steps = _steps_until(left, first, increase)
        return steps, first, increase

    def _next_end(self) -> int:
        ends = self._ends
        while True:
            tick, _, track, base = ends[0]
            if track.decodes and track.base == base:
                return tick
            heappop(ends)

    def _end_reached(self, stopped: dict[RequestId, tuple[bytes, ...]]) -> None:
        """Note and stop those that have their last token with the latest tick."""
        ends, tick = self._ends, self.ticks.count
        while ends and ends[0][0] <= tick:
            _, _, track, base = heappop(ends)
            if track.decodes and track.base == base:
                stopped[track.id] = ()

    def _sample(
        self, plan: StepPlan, at: float, stopped: dict[RequestId, tuple[bytes, ...]]
    ) -> None:
        for chunk in plan.chunks:
            if chunk.samples:
                track = self._tracks[chunk.id]
                track.sampled(at)
                self._joining.append(track)
                if track.generated == track.length:
                    stopped[chunk.id] = ()

    def _drop(self, drop: Drop) -> None:
        track = self._tracks[drop.id]
        if track.decodes:
            self._stop_decoding(track)
        elif track in self._joining:
            self._joining.remove(track)
        if drop.final:
            del self._tracks[drop.id]

    def _decode_only(self, decode: tuple[RequestId, ...]) -> None:
        """Make the set of decoding requests what the plan says."""
        if decode is self._decode:
            return
        self._decode = decode
        for track in self._joining:
            self._start_decoding(track)
        self._joining.clear()
        named = set(decode)
        if named != self._decoding.keys():
            # Lists, in an order that does not depend on how names hash.
            for track in [t for name, t in self._decoding.items() if name not in named]:
                self._stop_decoding(track)
            for name in [name for name in decode if name not in self._decoding]:
                self._start_decoding(self._tracks[name])

    def _start_decoding(self, track: Track) -> None:
        track.joins(self.ticks)
        self._decoding[track.id] = track
        # It attends to its prompt and all its tokens, the newest included.
        self._context += track.prompt + track.generated
        self._serial += 1
        heappush(self._ends, (track.length - track.base, self._serial, track, track.base))
        if self._longest:
            self._longest.add(track)

    def _stop_decoding(self, track: Track) -> None:
        del self._decoding[track.id]
        track.leaves(self.ticks)
        self._context -= track.prompt + track.generated


class _Longest:
    """The longest context among those that decode; all grow alike, so the order stays."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, RequestId, Track]] = []

    def add(self, track: Track) -> None:
        heappush(self._heap, (-(track.prompt + track.base), track.id, track))

    def at(self, tick: int) -> int:
        """Its tokens after so many ticks, the newest one included."""
        heap = self._heap
        while not (heap[0][2].decodes and heap[0][2].prompt + heap[0][2].base == -heap[0][0]):
            heappop(heap)
        return tick - heap[0][0]


def _steps_until(left: float, first: float, increase: float) -> int:
    """The least number of steps, at least 1, that take ``left`` seconds or more."""

    def taken(steps: int) -> float:
        return steps * first + increase * (steps * (steps - 1) // 2)

    if increase > 0:
        half = first - increase / 2
        root = math.sqrt(half * half + 2 * increase * max(0.0, left))
        steps = max(1, math.ceil((root - half) / increase))
    else:
        steps = max(1, math.ceil(left / first))
    # The root is as good as its rounding.
    while steps > 1 and taken(steps - 1) >= left:
        steps -= 1
    while taken(steps) < left:
        steps += 1
    return steps
