"""Many simulated runs: in parallel, kept as they end, and gone on with after an interruption.

Rule: a folder holds ``cells.jsonl``, to which the outcome of every run is added as it ends, under
a hash of all that decides it.  A run whose outcome is there is not made again; one that
failed is.  When all is done, ``sweep.json`` and ``sweep.parquet`` hold the grid that was asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from penstock import __version__
from penstock.sim.execute import one_run
from penstock.sim.interval import Interval, interval
from penstock.sim.parallel import Outcome, Work
from penstock.sim.result import RunResult
from penstock.sim.spec import RunSpec, SpecError, latency_model

if TYPE_CHECKING:
    import polars as pl

CELLS = "cells.jsonl"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A run of the grid and what came of it.

    Attributes:
        key: hash of the specification and of its profile's coefficients.
        result: its numbers; None if it failed, for the reason in ``error``.
        penstock: the version that made it; ``at`` is when, in Unix seconds.
    """

    key: str
    spec: RunSpec
    result: RunResult | None
    error: str | None = None
    penstock: str = __version__
    at: float = 0.0


class _Key(msgspec.Struct):
    """What must be read of every line, whatever version wrote it."""

    key: str
    error: str | None = None


class Group(msgspec.Struct, frozen=True):
    """Cells that differ in nothing but their seed; intervals are over seeds.

    Attributes:
        spec: the first one's.
        attainment, evicted_ratio: None if a run has none.
        p99: by latency, the mean over seeds of the 99th percentile, in seconds.
    """

    spec: RunSpec
    seeds: tuple[int, ...]
    goodput_output_tps: Interval
    throughput_output_tps: Interval
    attainment: Interval | None
    evicted_ratio: Interval | None
    memory: Interval
    p99: dict[str, float]


Runner: TypeAlias = Callable[[Work, Sequence[bytes]], Iterator[Outcome]]
"""Runs jobs somewhere, and says what came of them as they end."""


def sweep(
    specs: Sequence[RunSpec],
    folder: Path,
    run: Runner,
    *,
    fresh: bool = False,
    on_cell: Callable[[Cell], None] | None = None,
) -> list[Cell]:
    """Make the runs that are not there yet.

    Args:
        specs: the grid; no two are equal.
        folder: where outcomes are kept; made if it is missing.
        run: where.
        fresh: make all of them again.
        on_cell: told of every cell, those that were there before first.

    Returns:
        a cell per specification, in their order.

    Raises:
        SpecError: the folder holds something unreadable, or another sweep is writing to it.
        OSError: it cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_key = _by_key(specs)
    done: dict[str, Cell] = {}
    with _store(folder / CELLS) as (known, add):
        if not fresh:
            done = {key: _cell(line) for key, line in known.items() if key in by_key}
        tell = on_cell or _nothing
        for cell in done.values():
            tell(cell)
        left = [(key, spec) for key, spec in by_key.items() if key not in done]
        jobs = [msgspec.json.encode(spec) for _, spec in left]
        for place, value, error in run(run_cell, jobs):
            key, spec = left[place]
            result = None if value is None else msgspec.json.decode(value, type=RunResult)
            cell = Cell(key=key, spec=spec, result=result, error=error, at=time.time())
            add(msgspec.json.encode(cell))
            done[cell.key] = cell
            tell(cell)
    return [done[key] for key in by_key]


def run_cell(job: bytes) -> bytes:
    """One run, for a process of its own: a specification in, a result out."""
    return msgspec.json.encode(one_run(msgspec.json.decode(job, type=RunSpec)))


def groups(cells: Sequence[Cell]) -> list[Group]:
    """The cells that did not fail, by everything but the seed."""
    by_rest: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.result is not None:
            rest = msgspec.structs.replace(cell.spec, seed=0).key()
            by_rest.setdefault(rest, []).append(cell)
    return [_group(members) for members in by_rest.values()]


def varying(specs: Sequence[RunSpec]) -> list[str]:
    """Fields other than policy, load and seed in which they differ."""
    known = {"preset", "parameters", "seed", "clients", "rate", "speed", "trace_digest"}
    return [
        name
        for name in RunSpec.__struct_fields__
        if name not in known and len({getattr(spec, name) for spec in specs}) > 1
    ]


def frame(cells: Sequence[Cell]) -> pl.DataFrame:
    """A row per cell: its specification, its numbers, and who made it when."""
    import polars as pl

    return pl.DataFrame([_row(cell) for cell in cells], infer_schema_length=None)


def _by_key(specs: Sequence[RunSpec]) -> dict[str, RunSpec]:
    """Specifications by a hash of all that decides them, the profile's coefficients included."""
    models = {spec.profile: repr(latency_model(spec)) for spec in specs}
    found = {}
    for spec in specs:
        text = f"{spec.key()} {models[spec.profile]}".encode()
        found[hashlib.blake2b(text, digest_size=16).hexdigest()] = spec
    return found


def _group(cells: Sequence[Cell]) -> Group:
    results = [cell.result for cell in cells if cell.result is not None]

    def over_seeds(name: str) -> Interval | None:
        values = [value for r in results if (value := getattr(r, name)) is not None]
        return interval(values) if len(values) == len(results) else None

    def sure(name: str) -> Interval:
        return interval([getattr(r, name) for r in results])

    names = [name for name in results[0].latency if all(name in r.latency for r in results)]
    return Group(
        spec=cells[0].spec,
        seeds=tuple(cell.spec.seed for cell in cells),
        goodput_output_tps=sure("goodput_output_tps"),
        throughput_output_tps=sure("throughput_output_tps"),
        attainment=over_seeds("attainment"),
        evicted_ratio=over_seeds("evicted_ratio"),
        memory=sure("memory"),
        p99={name: interval([r.latency[name]["p99"] for r in results]).mean for name in names},
    )


def _row(cell: Cell) -> dict[str, Any]:
    spec: dict[str, Any] = msgspec.to_builtins(cell.spec)
    row = {"key": cell.key, "policy": cell.spec.policy_name, **spec}
    row |= {"parameters": msgspec.json.encode(cell.spec.parameters).decode()}
    row |= {"slo": " ".join(cell.spec.slo), "load": float(cell.spec.load)}
    row |= {"load_unit": cell.spec.load_unit, "error": cell.error}
    for name in RunResult.__struct_fields__:
        value = None if cell.result is None else getattr(cell.result, name)
        if name not in {"ends", "latency", "classes", "notes"}:
            row[name] = value
    latency = {} if cell.result is None else cell.result.latency
    for name in ("ttft", "tpot", "gap", "e2e"):
        for number in ("mean", "p50", "p90", "p99"):
            row[f"{name}_{number}_s"] = latency.get(name, {}).get(number)
    return {**row, "penstock": cell.penstock, "at": cell.at}


@contextmanager
def _store(path: Path) -> Iterator[tuple[dict[str, bytes], Callable[[bytes], None]]]:
    """The lines of a file by key, and a function that adds one for good."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"{path}: another sweep is writing to it"
            raise SpecError(msg) from None
        file.seek(0)
        data = file.read()
        # An interruption may have cut the last line: what is whole ends with a line's end.
        whole = data[: data.rfind(b"\n") + 1]
        file.truncate(len(whole))

        def add(line: bytes) -> None:
            file.write(line + b"\n")
            file.flush()

        yield _lines(path, whole), add


def _lines(path: Path, data: bytes) -> dict[str, bytes]:
    """The latest line of each run that did not fail."""
    lines = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            head = msgspec.json.decode(line, type=_Key)
        except msgspec.DecodeError as error:
            msg = f"{path}: line {number} is no cell of a sweep ({error}); name another folder"
            raise SpecError(msg) from None
        if head.error is None:
            lines[head.key] = line
    return lines


def _nothing(cell: Cell) -> None:
    del cell


def _cell(line: bytes) -> Cell:
    return msgspec.json.decode(line, type=Cell)
