"""An engine that computes nothing and knows how long it would have taken.

A decode step in which nobody comes or goes costs O(1): lengths advance by a common tick,
ends wait in buckets under the tick at which they fall, and token times are kept as spans of
ticks, one per uninterrupted stretch of decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.engine import Ticket, Work
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.types import Capabilities, Chunk, RequestId, StepPlan, StepResult
from penstock.sim.clock import VirtualClock


@dataclass(slots=True)
class Stretch:
    """Tokens that a request got without interruption.

    Attributes:
        sampled_at: when the token of its last prompt chunk came, in seconds; None if the
            stretch resumes after steps that the request sat out.
        first, last: the decode ticks that followed; none if ``last < first``.
    """

    sampled_at: float | None
    first: int
    last: int


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request in the machine.  While it decodes, it has ``base + ticks`` output tokens."""

    id: RequestId
    prompt: int
    length: int
    generated: int = 0
    base: int = 0
    decodes: bool = False
    stretches: list[Stretch] = field(default_factory=list)


@dataclass(slots=True)
class _Flight:
    plan: StepPlan
    seconds: float
    sampled: list[_Sequence]
    stopped: list[RequestId]


class SimEngine:
    """Carries plans out on a virtual clock.

    Requests end by themselves at their ``Work.trace_length``, which must be given.

    Args:
        capabilities: of the machine that is simulated; of depth 1.
        latency: durations of its steps.
        clock: advanced when a step is collected.

    Raises:
        ValueError: the depth is not 1.
    """

    def __init__(
        self, capabilities: Capabilities, latency: LatencyModel, clock: VirtualClock
    ) -> None:
        if capabilities.depth != 1:
            msg = f"capabilities.depth is {capabilities.depth}; a simulated engine has depth 1"
            raise ValueError(msg)
        self.capabilities = capabilities
        self._latency = latency
        self._clock = clock
        self._sequences: dict[RequestId, _Sequence] = {}
        self._decoding: dict[RequestId, _Sequence] = {}
        self._joining: list[_Sequence] = []
        self._decode: tuple[RequestId, ...] = ()
        self._context = 0
        self._ends: dict[int, list[tuple[_Sequence, int]]] = {}
        self._flight: _Flight | None = None
        self.tick_times: list[float] = [0.0]
        self.stretches: dict[RequestId, list[Stretch]] = {}

    @property
    def ticks(self) -> int:
        """Steps so far in which someone decoded."""
        return len(self.tick_times) - 1

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take a request in; only the lengths of its payload matter."""
        if work.trace_length is None:
            msg = f"request {request_id}: trace_length is None; the simulator needs a length"
            raise ValueError(msg)
        self._sequences[request_id] = _Sequence(request_id, len(work.prompt), work.trace_length)

    def discard(self, request_id: RequestId) -> None:
        """Forget a request."""
        self.stretches[request_id] = self._sequences.pop(request_id).stretches

    def submit(self, plan: StepPlan) -> Ticket:
        """Carry a plan out; time passes when it is collected."""
        for drop in plan.drops:
            sequence = self._sequences[drop.id]
            if sequence.decodes:
                self._stop_decoding(sequence)
            elif sequence in self._joining:
                self._joining.remove(sequence)
            if drop.final:
                self.discard(drop.id)
        decoding, context, stopped = 0, 0, list[RequestId]()
        if plan.decode:
            decoding = len(plan.decode)
            self._decode_only(plan.decode)
            context = self._context
            stopped = self._tick(decoding)
        prefill = work = 0.0
        sampled = []
        for chunk in plan.chunks:
            prefill += chunk.tokens
            work += chunk.tokens * (chunk.start + chunk.tokens / 2)
            if chunk.samples:
                sampled.append(self._sample(chunk, stopped))
        seconds = 0.0
        if decoding or prefill:
            load = StepLoad(decoding, context, int(prefill), work, len(plan.chunks))
            seconds = self._latency.seconds(load)
        self._flight = _Flight(plan, seconds, sampled, stopped)
        return Ticket(plan.number)

    def collect(self, ticket: Ticket) -> StepResult:
        """Let the step's time pass."""
        flight = self._flight
        assert flight is not None
        assert flight.plan.number == ticket.number
        self._flight = None
        self._clock.advance(flight.seconds)
        now = self._clock.now
        if flight.plan.decode:
            self.tick_times[-1] = now
        for sequence in flight.sampled:
            sequence.stretches.append(Stretch(now, self.ticks + 1, self.ticks))
        self._joining = flight.sampled
        return StepResult(ticket.number, flight.seconds, {}, dict.fromkeys(flight.stopped, ()))

    def close(self) -> None:
        """Forget everything."""
        self._sequences.clear()
        self._decoding.clear()

    def _tick(self, decoding: int) -> list[RequestId]:
        """One token for each decoding request; returns those that end with it."""
        self.tick_times.append(0.0)
        self._context += decoding
        ticks = self.ticks
        stopped = []
        for sequence, base in self._ends.pop(ticks, ()):
            # An end is stale if the request stopped decoding in between.
            if sequence.decodes and sequence.base == base:
                stopped.append(sequence.id)
        return stopped

    def _sample(self, chunk: Chunk, stopped: list[RequestId]) -> _Sequence:
        sequence = self._sequences[chunk.id]
        sequence.generated += 1
        if sequence.generated == sequence.length:
            stopped.append(chunk.id)
        return sequence

    def _decode_only(self, decode: tuple[RequestId, ...]) -> None:
        """Make the set of decoding requests what the plan says."""
        if decode is self._decode:
            return
        self._decode = decode
        for sequence in self._joining:
            self._start_decoding(sequence)
        self._joining.clear()
        # All that may decode do, unless the numbers differ.
        if len(decode) != len(self._decoding):
            named = set(decode)
            for request_id in self._decoding.keys() - named:
                self._stop_decoding(self._decoding[request_id])
            for request_id in named - self._decoding.keys():
                self._start_decoding(self._sequences[request_id])

    def _start_decoding(self, sequence: _Sequence) -> None:
        sequence.decodes = True
        sequence.base = sequence.generated - self.ticks
        self._decoding[sequence.id] = sequence
        # It attends to its prompt and all its tokens, the newest included.
        self._context += sequence.prompt + sequence.generated
        end = sequence.length - sequence.base
        self._ends.setdefault(end, []).append((sequence, sequence.base))
        if sequence.stretches[-1].first != self.ticks + 1:
            sequence.stretches.append(Stretch(None, self.ticks + 1, self.ticks))

    def _stop_decoding(self, sequence: _Sequence) -> None:
        sequence.decodes = False
        del self._decoding[sequence.id]
        sequence.generated = sequence.base + self.ticks
        self._context -= sequence.prompt + sequence.generated
        sequence.stretches[-1].last = self.ticks
