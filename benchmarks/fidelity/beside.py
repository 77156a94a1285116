"""Step times of another load, learned in short slices while a cell runs.

The speed of a shared machine changes by a factor of 1.4 and more within seconds.  What is
learned before or after a run is not the machine that the run had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import TypeAlias

import numpy as np
from cells import calibration, jobs, policy, prompts_of
from numpy.typing import NDArray

from penstock.core.engine import Engine, Work
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import Sample, mape
from penstock.core.forecast.latency.tiles import Tiles, fit_tiles
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import SLO, Request
from penstock.sim.profiling.steps import samples_of
from penstock.sim.recording import RecordingEngine, StepRecord
from penstock.sim.run import Job, Source

Floats: TypeAlias = NDArray[np.float64]

EVERY, FOR = 0.5, 0.15  # seconds of the cell between two slices, and seconds of a slice
COLD = 5  # steps of a slice that find the caches full of other things: up to 30 % slower
_HELD_OUT = 5
_ROUNDS = 4
_SMOOTH = 7


class _Loop:
    """An endless closed loop: its jobs are taken over and over."""

    def __init__(self, engine: Engine, level: int) -> None:
        workload, clients = calibration()[level]
        self._prompts = prompts_of(workload)
        self._jobs = jobs(workload, int(workload.longest_output or 1), SLO())
        self._next: Iterator[Job] = cycle(self._jobs)
        self._missing = clients
        self._count = 0
        self.steps: list[StepRecord] = []
        recording = RecordingEngine(engine, self.steps.append)
        scheduler = Scheduler(engine.capabilities, policy("vllm"))
        self._runtime = Runtime(scheduler, recording, time.perf_counter)

    def step(self) -> None:
        """One step."""
        while self._missing:
            job = next(self._next)
            self._count += 1
            self._missing -= 1
            request = Request(f"{self._count}", job.prompt, job.cap, time.perf_counter())
            work = Work(self._prompts[job.request], trace_length=job.output)
            self._runtime.add(request, work)
        output = self._runtime.step()
        assert output is not None
        self._missing += len(output.ended)


@dataclass(frozen=True)
class Slice:
    """Steps of one closed loop at one time of the cell's clock."""

    at: float
    level: int
    samples: tuple[Sample, ...]


class Beside:
    """Turns the closed loops of the calibration in short slices, one after another.

    Args:
        engine: makes one for a closed loop.
    """

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._loops = [_Loop(engine(), level) for level in range(len(calibration()))]
        self._turn = cycle(range(len(self._loops)))
        self._last = 0.0
        self.slices: list[Slice] = []

    def begin(self) -> None:
        """A cell begins; what was learned before is forgotten."""
        self._last = 0.0
        self.slices = []

    def due(self, now: float) -> bool:
        """Whether a slice is to be run at this time of the cell."""
        return now - self._last >= EVERY

    def slice(self, now: float) -> None:
        """Run one."""
        level = next(self._turn)
        loop = self._loops[level]
        loop.steps.clear()
        end = time.perf_counter() + FOR
        while time.perf_counter() < end:
            loop.step()
        warm = samples_of(loop.steps[COLD:])
        if warm:
            self.slices.append(Slice(now, level, tuple(warm)))
        self._last = now


@dataclass(frozen=True)
class Learned:
    """What the slices of all cells taught.

    Attributes:
        model: step times on the machine as it is in its median slice.
        courses: of each cell, how slow the machine was: times of the cell, and factors on the
            model.
        held_out: mean absolute relative error on every fifth slice, which was not fitted.
    """

    model: Tiles
    courses: tuple[tuple[Floats, Floats], ...]
    held_out: float

    def at_mean_speed(self, cell: int) -> Tiles:
        """The model, with its prices as they were on average over a cell's time."""
        slowness = self.courses[cell][1]
        # In slow times fewer steps are made: what counts is the mean speed.
        mean = 1 / float(np.mean(1 / slowness))
        return _scaled(self.model, mean)


def learn(cells: Sequence[Sequence[Slice]]) -> Learned:
    """Step times, and how the machine's speed went in each cell.

    How slow a slice was is its measured time over the model's; what the steps of a closed loop
    are off at all times is the model's fault and taken out.  Model and courses are fitted in
    turn.
    """
    slices = [one for cell in cells for one in cell]
    where = np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])
    held = np.arange(len(slices)) % _HELD_OUT == _HELD_OUT - 1
    slowness = np.ones(len(slices))
    taken = np.array([sum(sample.seconds for sample in one.samples) for one in slices])
    levels = np.array([one.level for one in slices])
    for _ in range(_ROUNDS):
        model = fit_tiles(_samples(slices, slowness, ~held))
        guessed = np.array(
            [sum(model.seconds(sample.load) for sample in one.samples) for one in slices]
        )
        for level in np.unique(levels):
            own = levels == level
            guessed[own] *= np.sum(taken[own] / slowness[own]) / np.sum(guessed[own])
        for cell in range(len(cells)):
            own = where == cell
            slowness[own] = _course(taken[own], guessed[own], held[own])
        slowness /= np.median(slowness)
    # What is off by more than noise is left out of the fit, but takes its time.
    chosen = _samples(slices, slowness, ~held)
    model = _scaled(
        model, sum(s.seconds for s in chosen) / sum(model.seconds(s.load) for s in chosen)
    )
    courses = tuple(
        (np.array([one.at for one in cell]), slowness[where == index])
        for index, cell in enumerate(cells)
    )
    return Learned(model, courses, mape(model, _samples(slices, slowness, held)))


def _scaled(model: Tiles, factor: float) -> Tiles:
    prices = {name: price * factor for name, price in asdict(model).items()}
    return Tiles(**prices | {"rows": model.rows})


def _samples(slices: Sequence[Slice], slowness: Floats, chosen: NDArray[np.bool_]) -> list[Sample]:
    """Steps of some slices, as on the median machine."""
    return [
        Sample(load, seconds / slow)
        for one, slow, wanted in zip(slices, slowness.tolist(), chosen.tolist(), strict=True)
        if wanted
        for load, seconds in one.samples
    ]


def _course(taken: Floats, guessed: Floats, held: NDArray[np.bool_]) -> Floats:
    """How slow each slice was: over itself and its neighbours, but for those held out."""
    weight = np.where(held, 0.0, 1.0)
    window = np.ones(_SMOOTH)
    return np.convolve(taken * weight, window, "same") / np.convolve(
        guessed * weight, window, "same"
    )


class Course:
    """A latency model on a machine whose speed changes, as it was learned; also its source.

    The simulator asks the source for what has come by now before each step, so that tells the
    time.
    """

    wants_longest = False

    def __init__(self, learned: Learned, cell: int, source: Source) -> None:
        self._model = learned.model
        self._at, self._slowness = (part.tolist() for part in learned.courses[cell])
        self._source = source
        self._now = 0.0
        self.next_arrival = source.next_arrival
        self.ended = source.ended

    def due(self, now: float) -> Iterable[Job]:
        """The source's, and the time."""
        self._now = now
        return self._source.due(now)

    def seconds(self, load: StepLoad) -> float:
        """The model's, at the speed of this time."""
        slow = float(np.interp(self._now, self._at, self._slowness))
        return self._model.seconds(load) * slow

    def decode_line(self, decoding: int) -> None:
        """Never: the next step may find another speed."""
