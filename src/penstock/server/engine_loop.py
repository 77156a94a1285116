"""Take commands in, turn the runtime, send each step's news up; however these travel."""

from __future__ import annotations

import os
import time
from typing import Protocol

from penstock.core.engine import KV
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.online import OnlineAffine
from penstock.core.runtime import Runtime, StepOutput
from penstock.core.types import RequestError
from penstock.server.factories import EngineSpec, build_engine, build_scheduler
from penstock.server.messages import (
    NOTHING_SWAPPED,
    Add,
    Cancel,
    Command,
    End,
    Event,
    Explain,
    Explained,
    Gauges,
    Missed,
    Prices,
    Ready,
    Refused,
    Step,
    Stop,
)
from penstock.server.swaps import SwapCounter
from penstock.sim.recording import StepRecord

# With requests waiting, time alone may change a decision (a deadline passes, a forecast ages).
_WAITING_POLL = 0.005
_IDLE_POLL = 1.0
# How often a thread of libgomp looks whether the others are done before it sleeps.
_SPINS = "10000"
_GUESS = Affine(step=1e-2, token=1e-4, work=0.0, request=1e-4, context=0.0)


class Pipe(Protocol):
    """The engine's end of the way to the front."""

    def receive(self) -> Command | None:
        """The next command, if there is one."""
        ...

    def wait(self, seconds: float) -> None:
        """Until there is a command, but no longer than this."""
        ...

    def send(self, event: Event) -> None:
        """Hand an event over."""
        ...


class KVDesk(Protocol):
    """Where KV is left for other instances, and found when it came from one."""

    def leave(self, slice_id: str, kv: KV, *, last: bool) -> None:
        """KV of a request; ``last``: it ends with the next step that is reported."""
        ...

    def find(self, slice_id: str) -> KV | None:
        """What came for a request, once."""
        ...


class StepPrices:
    """What steps cost, learned from each; a guess until there are enough of them."""

    def __init__(self) -> None:
        self._model = OnlineAffine(_GUESS)

    def observe(self, step: StepRecord) -> None:
        """Learn from a step."""
        seconds = step.total or step.seconds
        if seconds > 0:
            self._model.observe(step.load, seconds)

    @property
    def now(self) -> Prices:
        """The present prices."""
        model = self._model.model
        return model.step, model.token, model.request, model.context


def build_loop(spec: EngineSpec, pipe: Pipe, desk: KVDesk | None = None) -> EngineLoop:
    """Load the engine, and everything that turns it.

    Raises:
        Exception: whatever keeps the engine from loading, with its own words.
    """
    prices = StepPrices() if spec.prices else None
    engine = build_engine(spec, prices.observe if prices else None)
    swaps = SwapCounter(engine) if engine.capabilities.swap_tokens else None
    runtime = Runtime(build_scheduler(spec, engine), swaps or engine, time.monotonic)
    return EngineLoop(runtime, pipe, prices, desk, swaps)


def spin_briefly() -> None:
    """Have waiting threads sleep soon; before torch, whose OpenMP reads this when it is loaded.

    By default they spin for milliseconds, and where other processes want the cores too, that
    takes the time from the very threads that are waited for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


class EngineLoop:
    """Turns a runtime at the end of a pipe."""

    def __init__(
        self,
        runtime: Runtime,
        pipe: Pipe,
        prices: StepPrices | None = None,
        desk: KVDesk | None = None,
        swaps: SwapCounter | None = None,
    ) -> None:
        self._runtime = runtime
        self._pipe = pipe
        self._prices = prices
        self._desk = desk
        self._swaps = swaps
        self._received = 0
        self._stopping = False
        self._reported = True

    def run(self) -> None:
        """Until told to stop."""
        self._pipe.send(self.ready)
        while not self._stopping:
            if not self.turn():
                waiting = self._runtime.stats().waiting
                self._pipe.wait(_WAITING_POLL if waiting else _IDLE_POLL)

    @property
    def ready(self) -> Ready:
        """What the engine can do."""
        capabilities = self._runtime.engine.capabilities
        return Ready(
            capabilities.kv_blocks,
            capabilities.block_size,
            capabilities.max_batch,
            capabilities.max_step_tokens,
            capabilities.max_request_tokens,
        )

    def turn(self) -> bool:
        """Take the commands there are and run a step; False if there was nothing to do."""
        changed = self._take_commands()
        output = self._runtime.step()
        if output is None and not changed and self._reported:
            return False
        # Where nothing runs any more: say so once, or the last books would stand for ever.
        self._reported = output is None
        self._pipe.send(self._report(output or StepOutput({}, (), 0.0, 0.0)))
        return True

    def close(self) -> None:
        """Give back what the engine holds.  Idempotent."""
        self._runtime.engine.close()

    def _take_commands(self) -> bool:
        taken = False
        while not self._stopping and (command := self._pipe.receive()) is not None:
            self._obey(command)
            taken = True
        return taken

    def _obey(self, command: Command) -> None:
        match command:
            case Add():
                self._add(command)
            case Cancel():
                self._runtime.cancel(command.id, command.reason)
            case Explain():
                text = self._runtime.scheduler.explain(command.id)
                self._pipe.send(Explained(command.ticket, text or "it has ended"))
            case Stop():
                self._stopping = True

    def _add(self, command: Add) -> None:
        kv = self._desk.find(command.id) if command.computed and self._desk is not None else None
        there = 0 if kv is None else kv.tokens
        if there < command.computed:
            # Part of it was lost on the way; the engine could only give up over that.
            words = f"KV of {there} tokens came, where {command.computed} were computed"
            self._pipe.send(Missed(command.id, words))
            return
        self._received += 1
        try:
            request, work = command.unpack(self._runtime.engine.capabilities)
            self._runtime.add(request, work._replace(kv=kv))
        except RequestError as error:
            self._pipe.send(Refused(command.id, error.field, str(error)))

    def _report(self, output: StepOutput) -> Step:
        stats = self._runtime.stats()
        if self._desk is not None:
            for request_id, part in output.parts.items():
                self._desk.leave(request_id, part, last=False)
            for request_id, kv in output.kept.items():
                if kv is not None:
                    self._desk.leave(request_id, kv, last=True)
        details = {
            request_id: (token.logprob, list(token.top))
            for request_id, token in output.tokens.items()
            if token.logprob is not None
        }
        return Step(
            tokens={request_id: token.id for request_id, token in output.tokens.items()},
            details=details,
            ended=[
                End(end.id, end.reason, end.output_tokens, end.evictions, end.detail)
                for end in output.ended
            ],
            seconds=output.seconds,
            planning=output.planning,
            gauges=Gauges(
                received=self._received,
                running=stats.running,
                waiting=stats.waiting,
                waiting_tokens=stats.waiting_tokens,
                kv_usage=stats.kv_usage,
                evictions=stats.evictions,
                rate=stats.admission_rate,
                prices=self._prices.now if self._prices else None,
                host_tokens=self._swaps.held if self._swaps else 0,
            ),
            swapped=self._swaps.take() if self._swaps else NOTHING_SWAPPED,
        )
