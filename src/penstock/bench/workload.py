"""What is asked for, and when: lengths, arrivals, SLO classes.  Deterministic by seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.core.types import SLO

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

LONGEST = 2**31 - 1
"""Most tokens of a prompt or an output that a distribution may ask for."""


@dataclass(frozen=True, slots=True)
class SLOClass:
    """A named promise and its share of the requests (relative to the other classes')."""

    name: str = "default"
    slo: SLO = field(default_factory=SLO)
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Origin:
    """The file that a workload was read from.

    Attributes:
        path: the file.
        prompt, output: the columns of the lengths.
        rows: index of each request's row in the file.
        lines: the line of each of the file's rows; None where it has no lines.
    """

    path: str
    prompt: str
    output: str
    rows: Ints
    lines: Sequence[int] | None = None

    def cell(self, index: int, column: str) -> str:
        """Name a cell of one request by file, row and column."""
        return f"{self.path}: {self.place(int(self.rows[index]), self.lines)}, column {column!r}"

    @staticmethod
    def place(row: int, lines: Sequence[int] | None) -> str:
        """Name a row, given by its index."""
        return f"row {row + 1}" + ("" if lines is None else f" (line {lines[row]})")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests as columns of one length.

    Attributes:
        source: where the lengths come from, for reports.
        prompt: prompt tokens, each at least 1.
        output: true output lengths, each at least 1; None if the model decides.
        arrival: seconds from the start, not decreasing; None for lengths without times.
        hash_ids: per request, the ids of its prompt's prefix blocks; None without sharing.
        hash_block: prompt tokens per prefix block.
        classes: SLO classes; ``class_of`` holds indices into it.
        notes: what was left out or changed on the way, for reports.
        origin: the file that they were read from.
    """

    source: str
    prompt: Ints
    output: Ints | None
    arrival: Floats | None = None
    hash_ids: tuple[tuple[int, ...], ...] | None = None
    hash_block: int = 0
    classes: tuple[SLOClass, ...] = (SLOClass(),)
    class_of: Ints | None = None
    notes: tuple[str, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def slo_class(self, index: int) -> SLOClass:
        """The class of one request."""
        return self.classes[0 if self.class_of is None else int(self.class_of[index])]

    def output_of(self, index: int) -> int | None:
        """True output length of one request."""
        return None if self.output is None else int(self.output[index])

    @property
    def longest_output(self) -> int | None:
        """The longest true output length."""
        return None if self.output is None else int(self.output.max())

    def take(self, rows: Sequence[int] | Ints) -> Workload:
        """The requests at these rows, in this order; arrival times are kept."""
        index = np.asarray(rows, dtype=np.int64)
        origin = self.origin
        return replace(
            self,
            origin=None if origin is None else replace(origin, rows=origin.rows[index]),
            prompt=self.prompt[index],
            output=None if self.output is None else self.output[index],
            arrival=None if self.arrival is None else self.arrival[index],
            hash_ids=None if self.hash_ids is None else tuple(self.hash_ids[i] for i in index),
            class_of=None if self.class_of is None else self.class_of[index],
        )

    def scaled(self, factor: float) -> Workload:
        """Lengths times ``factor``, rounded, at least 1; prefix blocks shrink with them.

        Raises:
            ValueError: the factor is not in (0, 1], or a prefix block would vanish.
        """
        if not 0 < factor <= 1:
            msg = f"scale is {factor}; it must be in (0, 1]"
            raise ValueError(msg)
        block = round(self.hash_block * factor)
        if self.hash_block and block < 1:
            msg = f"scale is {factor}: prefix blocks of {self.hash_block} tokens would vanish"
            raise ValueError(msg)
        return replace(
            self,
            prompt=_shrink(self.prompt, factor),
            output=None if self.output is None else _shrink(self.output, factor),
            hash_block=block,
            notes=self.notes if factor == 1 else (*self.notes, f"lengths scaled by {factor:g}"),
        )

    def with_classes(self, classes: Sequence[SLOClass], seed: int) -> Workload:
        """Deal the classes out at random by weight."""
        weights = np.array([c.weight for c in classes], dtype=np.float64)
        rng = _rng(seed, "classes")
        dealt = rng.choice(len(classes), size=len(self), p=weights / weights.sum())
        return replace(self, classes=tuple(classes), class_of=dealt.astype(np.int64))

    def with_arrivals(self, arrival: Floats) -> Workload:
        """The same requests at these times."""
        return replace(self, arrival=arrival)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts.

    Written ``512``, ``uniform:32-4096`` or ``lognormal:MEDIAN,SIGMA[,MAX]`` (sigma of the
    natural logarithm).  Draws are whole numbers from 1 to :data:`LONGEST`.
    """

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read the notation above.

        Raises:
            ValueError: it is something else, or has lengths above :data:`LONGEST`.
        """
        number = r"\d+(?:\.\d+)?"
        for kind, pattern in (
            ("fixed", r"(?:fixed:)?(\d+)"),
            ("uniform", r"uniform:(\d+)-(\d+)"),
            ("lognormal", rf"lognormal:({number}),({number})(?:,(\d+))?"),
        ):
            match = re.fullmatch(pattern, text)
            if match:
                numbers = tuple(float(g) for g in match.groups() if g is not None)
                if min(numbers) <= 0 or (kind == "uniform" and numbers[1] < numbers[0]):
                    break
                if max(numbers) > LONGEST:
                    msg = (
                        f"length distribution {text!r} is out of range; its numbers must be at "
                        f"most {LONGEST}"
                    )
                    raise ValueError(msg)
                return cls(kind, numbers)
        msg = (
            f"length distribution {text!r} is not understood; write 512, uniform:32-4096 or "
            "lognormal:200,0.8 or lognormal:200,0.8,4096 (median, sigma, largest), above 0"
        )
        raise ValueError(msg)

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """``count`` lengths.

        Raises:
            ValueError: a lognormal without a largest length drew one above :data:`LONGEST`.
        """
        if self.kind == "fixed":
            return np.full(count, int(self.numbers[0]), dtype=np.int64)
        if self.kind == "uniform":
            low, high = (int(n) for n in self.numbers)
            return rng.integers(low, high, size=count, endpoint=True)
        median, sigma, *rest = self.numbers
        most = rest[0] if rest else LONGEST
        logs = np.log(median) + sigma * rng.standard_normal(count)
        if not rest and (logs > np.log(LONGEST)).any():
            msg = (
                f"length distribution {_name(self)} draws more than {LONGEST} tokens; give a "
                "largest length, as in lognormal:200,0.8,4096, or a smaller sigma"
            )
            raise ValueError(msg)
        # Cut before the exponential too, which would overflow.
        values = np.exp(np.minimum(logs, np.log(most)))
        drawn: Ints = np.clip(np.rint(values), 1, most).astype(np.int64)
        return drawn


def synthetic(prompt: Lengths, output: Lengths | None, count: int, seed: int) -> Workload:
    """``count`` requests with independent lengths."""
    rng = _rng(seed, "lengths")
    drawn = prompt.draw(count, rng)
    names = f"prompt {_name(prompt)}, output {_name(output) if output else 'by the model'}"
    return Workload(names, drawn, None if output is None else output.draw(count, rng))


def poisson(count: int, rate: float, seed: int) -> Floats:
    """Arrival times of a Poisson process of ``rate`` requests per second, the first at 0."""
    return gamma(count, rate, 1.0, seed)


def gamma(count: int, rate: float, cv: float, seed: int) -> Floats:
    """Arrival times with gamma-distributed spacing; ``cv`` 1 is Poisson, above 1 is bursty.

    Raises:
        ValueError: rate or cv is not positive.
    """
    for name, value in (("rate", rate), ("cv", cv)):
        if not 0 < value < np.inf:
            msg = f"{name} is {value}; it must be above 0"
            raise ValueError(msg)
    shape = 1 / cv**2
    spaces = _rng(seed, "arrivals").gamma(shape, 1 / (rate * shape), size=count)
    spaces[:1] = 0.0
    return np.cumsum(spaces)


def shuffled(workload: Workload, count: int, seed: int) -> Workload:
    """``count`` requests drawn without replacement; with it once all have been drawn.

    Times are dropped: a random draw of a trace no longer has its arrival process.
    """
    rng = _rng(seed, "rows")
    rounds = -(-count // len(workload))
    rows = np.concatenate([rng.permutation(len(workload)) for _ in range(rounds)])[:count]
    return replace(workload.take(rows), arrival=None)


def stretch(workload: Workload, count: int, seed: int) -> Workload:
    """``count`` neighbours from a random request on; after the last one comes the first.

    For traces whose requests share prefixes: what was near in time shares most, and one by one
    at random they would find less of it in a cache.  Times are dropped.
    """
    first = int(_rng(seed, "rows").integers(len(workload)))
    taken = workload.take((first + np.arange(count)) % len(workload))
    note = "a random stretch of the trace in its own order: neighbours share prefixes"
    return replace(taken, arrival=None, notes=(*taken.notes, note))


def parse_slo(texts: Sequence[str]) -> tuple[SLOClass, ...]:
    """Read ``[NAME[*WEIGHT]:]bound=seconds,...``, for example ``chat*0.7:ttft=2,gap=0.5``.

    Raises:
        ValueError: a text is something else, or two classes share a name.
    """
    classes = tuple(_parse_class(text) for text in texts) or (SLOClass(),)
    names = [c.name for c in classes]
    for name in names:
        if names.count(name) > 1:
            msg = f"slo: class {name!r} is given {names.count(name)} times; name each class once"
            raise ValueError(msg)
    return classes


def _parse_class(text: str) -> SLOClass:
    head, _, tail = text.rpartition(":")
    match = re.fullmatch(r"([\w.-]+)(?:\*(\d+(?:\.\d+)?))?", head) if head else None
    bounds: dict[str, float] = {}
    for part in tail.split(","):
        name, equals, value = part.partition("=")
        if name not in {"ttft", "tpot", "gap", "e2e"} or not equals or name in bounds:
            break
        try:
            bounds[name] = float(value)
        except ValueError:
            break
    else:
        if match or not head:
            label, weight = match.groups() if match else ("default", None)
            if weight is None or float(weight) > 0:
                return SLOClass(label or "default", SLO(**bounds), float(weight or 1))
    msg = (
        f"slo {text!r} is not understood; write bounds in seconds such as ttft=2,gap=0.5 "
        "(ttft, tpot, gap, e2e), or a class NAME*WEIGHT:ttft=2,gap=0.5 with a weight above 0"
    )
    raise ValueError(msg)


def _shrink(lengths: Ints, factor: float) -> Ints:
    shrunk: Ints = np.maximum(1, np.rint(lengths * factor)).astype(np.int64)
    return shrunk


def _name(lengths: Lengths) -> str:
    numbers = ("-" if lengths.kind == "uniform" else ",").join(f"{n:g}" for n in lengths.numbers)
    return f"{lengths.kind}:{numbers}"


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """One stream per purpose, so that changing one thing does not redraw the others."""
    return np.random.default_rng([seed, *purpose.encode()])
