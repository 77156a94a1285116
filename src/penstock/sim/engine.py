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

from penstock.core.engine import Ticket, Work
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.types import Capabilities, Drop, RequestId, StepPlan, StepResult, Token
from penstock.sim.clock import VirtualClock
from penstock.sim.ticks import TickTimes
from penstock.sim.track import Track

_LONGEST_STRETCH = 1 << 30
_NO_TOKENS: MappingProxyType[RequestId, Token] = MappingProxyType({})


class SimEngine:
    """Carries plans out on a virtual clock.

    Requests end by themselves at their ``Work.trace_length``, which must be given.

    Args:
        capabilities: of the machine that is simulated; of depth 1.
        latency: durations of its steps.
        clock: advanced when a step is collected.

    Attributes:
        ticks: when decode steps ended.
        plan: the latest one.
        cached_tokens: tokens with which requests began because they were in the prefix cache.
        wake_at: it comes back for a plan after the first step that ends then or later.

    Raises:
        ValueError: the depth is not 1.
    """

    def __init__(
        self, capabilities: Capabilities, latency: LatencyModel, clock: VirtualClock
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
        self._latency = latency
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
        self._result: StepResult | None = None

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take a request in; only the lengths of its payload matter."""
        if work.trace_length is None:
            msg = f"request {request_id}: trace_length is None; the simulator needs a length"
            raise ValueError(msg)
        self._tracks[request_id] = Track(request_id, len(work.prompt), work.trace_length)

    def track(self, request_id: RequestId) -> Track:
        """The tokens of an open request; the object stays of use after its end."""
        return self._tracks[request_id]

    def discard(self, request_id: RequestId) -> None:
        """Forget a request."""
        del self._tracks[request_id]

    def settle(self, track: Track) -> None:
        """Bring a track up to date: it had a token in each tick up to now."""
        if track.decodes:
            track.settle(self.ticks)

    def submit(self, plan: StepPlan) -> Ticket:
        """Carry a plan out; its time passes when it is collected."""
        self.plan = plan
        for drop in plan.drops:
            self._drop(drop)
        if self.capabilities.prefix_cache:
            cached = sum(len(start.cached) for start in plan.starts)
            self.cached_tokens += cached * self.capabilities.block_size
        now, decoding, steps = self._clock.now, len(plan.decode), 1
        first = increase = 0.0
        if decoding:
            self._decode_only(plan.decode)
        if plan.repeat > 1:
            steps, first, increase = self._stretch(plan, now, decoding)
            seconds = steps * first + increase * (steps * (steps - 1) // 2)
        elif decoding or plan.chunks:
            seconds = first = self._latency.seconds(self._load(plan, decoding))
        else:
            seconds = 0.0
        stopped: dict[RequestId, tuple[bytes, ...]] = {}
        if decoding:
            self.ticks.append(steps, now, first, increase)
            self._context += decoding * steps
            self._end_reached(stopped)
        if plan.chunks:
            self._sample(plan, now + seconds, stopped)
        self._result = StepResult(plan.number, seconds, _NO_TOKENS, stopped, steps=steps)
        return Ticket(plan.number)

    def collect(self, ticket: Ticket) -> StepResult:
        """Let the time of the step, or of the stretch, pass."""
        result, self._result = self._result, None
        assert result is not None
        assert result.number == ticket.number
        self._clock.now += result.seconds
        return result

    def close(self) -> None:
        """Forget everything."""
        self._tracks.clear()
        self._decoding.clear()

    def _load(self, plan: StepPlan, decoding: int) -> StepLoad:
        context = self._context if decoding else 0
        longest = self._longest.at(self.ticks.count) if self._longest and decoding else 0
        if not plan.chunks:
            return StepLoad(decoding, context, longest=longest)
        prefill, work = 0, 0.0
        for chunk in plan.chunks:
            prefill += chunk.tokens
            work += chunk.tokens * (chunk.start + chunk.tokens / 2)
        return StepLoad(decoding, context, prefill, work, len(plan.chunks), longest)

    def _stretch(self, plan: StepPlan, now: float, decoding: int) -> tuple[int, float, float]:
        """Steps until somebody ends or time is up, seconds of the first, increase per step."""
        line = self._latency.decode_line(decoding)
        assert line is not None
        first = line[0] + line[1] * self._context
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
        # All that may decode do, unless the numbers differ.
        if len(decode) != len(self._decoding):
            named = set(decode)
            for request_id in self._decoding.keys() - named:
                self._stop_decoding(self._decoding[request_id])
            for request_id in named - self._decoding.keys():
                self._start_decoding(self._tracks[request_id])

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
