"""What each step of an engine computed and how long it took, host time between steps included.

Problem: a profile for a simulator must hold the whole of a step: an engine measures its own part,
and planning, sampling, messages and streaming come on top.
Rule: a step that follows another directly lasts from that one's end to its own; one that an idle
engine begins lasts as long as the engine says, and its host time is unknown.
Limits: work that a host does beside the engine, on another core, is in here only as far as
it holds the loop up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from penstock.core.engine import KV, Engine, Ticket, Work
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.loads import load_of
from penstock.core.types import Capabilities, RequestId, StepPlan, StepResult


class StepRecord(NamedTuple):
    """A measured step.

    Attributes:
        load: what it computed.
        seconds: as the engine measured it.
        host: what passed since the end of the step before, beyond that; None if there was no
            step directly before it.
    """

    load: StepLoad
    seconds: float
    host: float | None

    @property
    def total(self) -> float | None:
        """From the end of the step before to its own; None if there was none directly before."""
        return None if self.host is None else self.host + self.seconds


class RecordingEngine:
    """An engine that hands all plans to another one and notes what each took.

    Args:
        engine: who does the work; of depth 1 and without repeated plans.
        keep: called with each step that computed something.
        clock: seconds.
        close: called when the engine is closed.

    Raises:
        ValueError: it keeps several plans in flight or repeats them.
    """

    def __init__(
        self,
        engine: Engine,
        keep: Callable[[StepRecord], object],
        clock: Callable[[], float] = time.perf_counter,
        close: Callable[[], object] = lambda: None,
    ) -> None:
        offered = engine.capabilities
        if offered.depth != 1 or offered.max_repeat != 1:
            msg = (
                f"depth is {offered.depth} and max_repeat {offered.max_repeat}; steps can be "
                "recorded where both are 1"
            )
            raise ValueError(msg)
        self._engine = engine
        self._keep = keep
        self._clock = clock
        self._close = close
        self._known: dict[RequestId, int] = {}  # tokens: prompt, and output so far
        self._started: set[RequestId] = set()
        self._ended: float | None = None
        self._pending: tuple[StepPlan, StepLoad, bool] | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Those of the recorded engine."""
        return self._engine.capabilities

    def open(self, request_id: RequestId, work: Work) -> None:
        """Hand it on."""
        self._engine.open(request_id, work)
        self._known[request_id] = len(work.prompt) + len(work.generated)

    def discard(self, request_id: RequestId) -> None:
        """Hand it on."""
        self._engine.discard(request_id)
        self._known.pop(request_id, None)

    def take_kv(self, request_id: RequestId, start: int = 0, end: int | None = None) -> KV | None:
        """Hand it on."""
        return self._engine.take_kv(request_id, start, end)

    def submit(self, plan: StepPlan) -> Ticket:
        """Hand it on, and note what is to be computed."""
        for drop in plan.drops:
            self._started.discard(drop.id)
            if drop.final:
                del self._known[drop.id]
        follows = bool(self._started)
        self._started.update(start.id for start in plan.starts)
        self._pending = (plan, load_of_plan(plan, self._known), follows)
        return self._engine.submit(plan)

    def collect(self, ticket: Ticket) -> StepResult:
        """Hand it on, and note how long it took."""
        result = self._engine.collect(ticket)
        now = self._clock()
        assert self._pending is not None
        plan, load, follows = self._pending
        for request_id in plan.decode:
            self._known[request_id] += 1
        for chunk in plan.chunks:
            if chunk.samples:
                self._known[chunk.id] += 1
        if plan.tokens:
            host = None
            if follows and self._ended is not None:
                host = max(0.0, now - self._ended - result.seconds)
            self._keep(StepRecord(load, result.seconds, host))
            self._ended = now
        return result

    def close(self) -> None:
        """Hand it on."""
        self._engine.close()
        self._close()


class StepFile:
    """Writes steps to a file, one JSON list a line; adds to what it holds.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        # Unbuffered: a process that is killed leaves whole lines.
        self._file = path.open("ab", buffering=0)
        self._encode = msgspec.json.Encoder().encode

    def add(self, step: StepRecord) -> None:
        """Write a step."""
        self._file.write(self._encode(step) + b"\n")

    def close(self) -> None:
        """Write what is held back.  Idempotent."""
        self._file.close()


def read_steps(path: Path) -> list[StepRecord]:
    """The steps of a file.

    Raises:
        ValueError: a line is no step; names the file and the line.
        OSError: it cannot be read.
    """
    decode = msgspec.json.Decoder(StepRecord).decode
    steps = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            steps.append(decode(line))
        except msgspec.DecodeError as error:
            msg = f"{path}, line {number}: no step: {error}"
            raise ValueError(msg) from None
    return steps


def load_of_plan(plan: StepPlan, known: dict[RequestId, int]) -> StepLoad:
    """What a plan computes.

    Args:
        known: tokens of each request before the step, its newest included: to those a decoding
            one attends.
    """
    contexts = [known[request_id] for request_id in plan.decode]
    chunks = ((chunk.start, chunk.tokens) for chunk in plan.chunks)
    return load_of(len(contexts), sum(contexts), max(contexts, default=0), chunks)
