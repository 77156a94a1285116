"""The largest load that a configuration sustains, or the fewest machines for a load.

Problem: an operator promises a latency to a share of the requests and must know how much load
that leaves room for; one run at one load does not say.

Rule: for each seed by itself, double or halve the load until one is sustained and one is not, then
bisect between them.  A load is *sustained* if the share of requests that met their SLO over the
whole run is at least the target.  What varies with the seed is lengths, arrivals, classes and the
policy's draws; so the answers differ, and their mean has Student's 95 % interval.  It runs from
the interval of the largest loads that were sustained to that of the smallest that were not, so
the resolution of the search is part of it.

Limits: attainment need not fall evenly with load, and a search then finds one of the places where
it crosses the target.  A finite run forgives a slight overload until its queue is longer than the
SLO allows: the excess is about the TTFT bound over the length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import msgspec

from penstock.bench.workload import parse_slo
from penstock.sim.execute import one_run
from penstock.sim.interval import SAME_LOAD, Interval, interval, ratio
from penstock.sim.parallel import outcomes
from penstock.sim.spec import RunSpec, SpecError

Searched: TypeAlias = Literal["rate", "clients", "speed", "instances"]

UNITS: dict[str, str] = {
    "rate": "req/s",
    "clients": "clients",
    "speed": "x trace speed",
    "instances": "instances",
}
BOUNDS: dict[str, tuple[float, float]] = {
    "rate": (0.01, 10_000),
    "clients": (1, 4096),
    "speed": (0.01, 100),
    "instances": (1, 256),
}
"""Where a search looks unless it is told otherwise."""

_LONG_ENOUGH = 50  # of the TTFT bound: a finite run then forgives 2 % at most


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """How to search.

    Attributes:
        find: the field of the specification that is searched.
        attainment: the share of requests that must meet their SLO, in (0, 1].
        low, high: the bounds of the search.
        start: the first value that is tried.
        tolerance: the search ends when the smallest load that is not sustained is so close above
            the largest that is, as a share of it, or when whole numbers are neighbours; numbers
            of instances always are.
    """

    find: Searched
    attainment: float
    low: float
    high: float
    start: float
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1:
            msg = f"attainment is {self.attainment}; it must be in (0, 1], as 0.99"
            raise SpecError(msg)
        if not 0 < self.low < self.high < math.inf:
            msg = f"between is {self.low:g}:{self.high:g}; it must be LOW:HIGH, 0 < LOW < HIGH"
            raise SpecError(msg)
        if not 0 < self.tolerance < 1:
            msg = f"tolerance is {self.tolerance}; it must be in (0, 1)"
            raise SpecError(msg)
        if self.whole and not (float(self.low).is_integer() and float(self.high).is_integer()):
            msg = f"between is {self.low:g}:{self.high:g}; {self.find} are whole numbers"
            raise SpecError(msg)

    @property
    def whole(self) -> bool:
        """Whether only whole numbers make sense."""
        return self.find in {"clients", "instances"}

    @property
    def step(self) -> float:
        """How close two values can be."""
        return 1.0 if self.whole else 0.0


class Tried(msgspec.Struct, frozen=True):
    """A run of the search; ``seconds`` are simulated."""

    value: float
    attainment: float
    goodput_output_tps: float
    seconds: float


class Answer(msgspec.Struct, frozen=True):
    """What the search found for one seed.

    Attributes:
        sustained: the largest load that was, or the fewest instances that were enough; None if
            none was within the bounds.
        missed: the nearest value that was not sustained; None if all within the bounds were.
        tried: in order.
    """

    seed: int
    sustained: float | None
    missed: float | None
    tried: tuple[Tried, ...]

    def at(self, value: float | None) -> Tried | None:
        """The run at a value."""
        return next((one for one in self.tried if one.value == value), None)


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The answers of all seeds for one configuration.

    Attributes:
        spec: without the searched load, of the first seed.
        mean: of what was sustained, over seeds, with the interval of the module's rule; None if
            the search of a seed ended at a bound.
        safe: what was sustained under every seed; None if a seed sustained nothing.
        attainment, goodput_output_tps: means over seeds at what each sustained.
        to_first: ratio of what was sustained to that of the first configuration, seed by
            seed; None for the first itself.
        notes: what to know before believing it.
    """

    spec: RunSpec
    answers: tuple[Answer, ...]
    mean: Interval | None
    safe: float | None
    attainment: float | None
    goodput_output_tps: float | None
    to_first: Interval | None = None
    notes: tuple[str, ...] = ()


class _Job(msgspec.Struct):
    spec: RunSpec
    search: Search


def capacities(
    specs: Sequence[RunSpec], search: Search, seeds: Sequence[int], workers: int
) -> list[Capacity]:
    """Search for each configuration and seed; the searches run in parallel.

    Args:
        specs: configurations; their searched load and seed mean nothing.
        search: what to look for, and where.
        seeds: different ones.
        workers: processes.

    Raises:
        SpecError: no SLO, or a run that cannot be made; the message says why.
    """
    for spec in specs:
        _check(spec)
    jobs = [
        _Job(msgspec.structs.replace(spec, seed=seed), search) for spec in specs for seed in seeds
    ]
    answers: dict[int, Answer] = {}
    for place, value, error in outcomes(search_job, list(map(msgspec.json.encode, jobs)), workers):
        if value is None:
            spec = jobs[place].spec
            msg = f"{spec.policy_name}, seed {spec.seed}: {error}"
            raise SpecError(msg)
        answers[place] = msgspec.json.decode(value, type=Answer)
    count = len(seeds)
    found = [
        _capacity(spec, search, [answers[i] for i in range(n * count, (n + 1) * count)])
        for n, spec in enumerate(specs)
    ]
    return [found[0], *(_compared(one, found[0]) for one in found[1:])]


def search_job(job: bytes) -> bytes:
    """The search of one seed, for a process of its own."""
    decoded = msgspec.json.decode(job, type=_Job)
    return msgspec.json.encode(answer(decoded.spec, decoded.search))


def answer(spec: RunSpec, search: Search) -> Answer:
    """The search of one specification's own seed.

    Raises:
        ValueError: it cannot be simulated.
    """
    tried: list[Tried] = []

    def sustains(value: float) -> bool:
        result = one_run(_at(spec, search, value))
        share = result.attainment or 0.0
        tried.append(Tried(value, share, result.goodput_output_tps, result.seconds))
        return share >= search.attainment

    if search.find == "instances":
        # More is easier: what is searched is the largest number that is not enough.
        exact = msgspec.structs.replace(search, tolerance=1e-9)
        missed, sustained = largest(lambda value: not sustains(value), exact)
        if missed is None and search.low == 1:
            missed = 0.0  # no instance at all: nothing to try, and no bound of the search
    else:
        sustained, missed = largest(sustains, search)
    return Answer(spec.seed, sustained, missed, tuple(tried))


def largest(holds: Callable[[float], bool], search: Search) -> tuple[float | None, float | None]:
    """The largest value at which something holds, and the nearest above at which it does not.

    None for the first: it holds nowhere within the bounds.  None for the second: it holds up
    to the upper bound.
    """
    value = min(max(search.start, search.low), search.high)
    good = bad = None
    while good is None or bad is None:
        if holds(value):
            good, end = value, search.high
            following = min(value * 2, end)
        else:
            bad, end = value, search.low
            following = max(value // 2 if search.whole else value / 2, end)
        if value == end:
            break
        value = following
    if good is None or bad is None:
        return good, bad
    while bad - good > max(search.step, search.tolerance * good):
        middle = (good + bad) // 2 if search.whole else math.sqrt(good * bad)
        if not good < middle < bad:  # no number lies between them
            break
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good, bad


def _at(spec: RunSpec, search: Search, value: float) -> RunSpec:
    number = int(value) if search.whole else value
    if search.find == "rate":  # its arrivals are divided by the speed
        number = value / spec.speed
    return msgspec.structs.replace(spec, **{search.find: number})


def _check(spec: RunSpec) -> None:
    if not spec.slo:
        msg = "--slo is needed: without a promise every load is sustained"
        raise SpecError(msg)
    parse_slo(spec.slo)


def _capacity(spec: RunSpec, search: Search, answers: Sequence[Answer]) -> Capacity:
    sustained = [a.sustained for a in answers if a.sustained is not None]
    missed = [a.missed for a in answers if a.missed is not None]
    at = [run for a in answers if (run := a.at(a.sustained)) is not None]
    fewest = search.find == "instances"
    mean = None
    if len(sustained) == len(missed) == len(answers):
        mean = interval(sustained)
        if not fewest:  # which is found exactly
            mean = _with_resolution(mean, interval(missed))
    safe = None
    if len(sustained) == len(answers):
        safe = max(sustained) if fewest else min(sustained)
    return Capacity(
        spec=spec,
        answers=tuple(answers),
        mean=mean,
        safe=safe,
        attainment=interval([run.attainment for run in at]).mean if at else None,
        goodput_output_tps=interval([run.goodput_output_tps for run in at]).mean if at else None,
        notes=tuple(_notes(spec, search, answers, at)),
    )


def _with_resolution(sustained: Interval, missed: Interval) -> Interval:
    """From the mean of what was sustained: the smaller lower and the larger upper bound."""
    if sustained.low is None or missed.low is None or sustained.high is None or missed.high is None:
        return Interval(sustained.mean, None, None)
    return Interval(
        sustained.mean, min(sustained.low, missed.low), max(sustained.high, missed.high)
    )


def _notes(
    spec: RunSpec, search: Search, answers: Sequence[Answer], at: Sequence[Tried]
) -> list[str]:
    unit, notes = UNITS[search.find], []
    fewest = search.find == "instances"
    over = [a.seed for a in answers if a.missed is None]
    none = [a.seed for a in answers if a.sustained is None]
    if over:
        end = search.low if fewest else search.high
        notes.append(
            f"all {unit} that were tried were sustained, the bound of {end:g} too (seeds "
            f"{_list(over)}); move --between"
        )
    if none:
        end = search.high if fewest else search.low
        notes.append(
            f"not even {end:g} {unit} sustained the target (seeds {_list(none)}); move --between, "
            "or ask for less"
        )
    if len(answers) < 2:
        notes.append("one seed says nothing about spread; give more with --seeds")
    if spec.arrivals == "trace":
        notes.append(SAME_LOAD)
    bound = max((c.slo.ttft or 0.0 for c in parse_slo(spec.slo)), default=0.0)
    if not fewest and any(run.seconds < _LONG_ENOUGH * bound for run in at):
        shortest = min(run.seconds for run in at)
        notes.append(
            f"runs lasted {shortest:.0f} s, under {_LONG_ENOUGH} times the TTFT bound of {bound:g} "
            "s: a slight overload may have ended before its queue showed; raise --requests"
        )
    return notes


def _compared(one: Capacity, first: Capacity) -> Capacity:
    pairs = [
        (a.sustained, b.sustained)
        for a, b in zip(one.answers, first.answers, strict=True)
        if a.sustained is not None and b.sustained is not None
    ]
    if len(pairs) < len(one.answers):
        return one
    return msgspec.structs.replace(one, to_first=ratio(*zip(*pairs, strict=True)))


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
