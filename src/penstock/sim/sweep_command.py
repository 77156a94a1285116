"""``penstock sweep``: a grid of simulations from the command line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from penstock import __version__
from penstock.bench.result import command_line, machine, seconds, share
from penstock.sim.command import MachineOptions, RequestOptions
from penstock.sim.grid import grid, parse_axes
from penstock.sim.interval import SAME_LOAD, Interval
from penstock.sim.output import STDOUT, check_targets, write_json
from penstock.sim.parallel import default_workers, outcomes
from penstock.sim.sweep import Cell, Group, Runner, frame, groups, sweep, varying

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
_INTERRUPTED = 130


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class GridOptions:
    """Which runs, and where they are kept.

    Attributes:
        out: Folder for the results. What it holds already is not run again, so the same
            command goes on after an interruption.
        over: Several values for an option, as rate=1,2,4 or seed=0-4 or parameters.reserve=0,0.05
            or instances=1,2; with ; between values that have commas. Repeat it: every
            combination is run.
        jobs: Processes; by default one per core.
        ray: Spread the runs over the Ray cluster at this address, or 'local': over a Ray that is
            started on this machine. Every machine needs the traces under the same paths.
        fresh: Run everything again.
        json: Write all numbers to this file as well; - writes only JSON to standard output.
        html: Write a report with figures: everything against load, and what happened over time
            at one load, for which runs are made once more.
        show: That load; by default the one at which attainments differ most.
    """

    out: Path
    over: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None
    jobs: int | None = None
    ray: str | None = None
    fresh: bool = False
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    html: Path | None = None
    show: float | None = None


def sweep_command(
    *,
    runs: GridOptions,
    requests: RequestOptions | None = None,
    machine_options: MachineOptions | None = None,
) -> int:
    """Simulate every combination of presets, parameters, loads, machines and seeds.

    Takes the options of 'penstock simulate'; --over gives several values for any of them.
    Intervals are Student's 95 % intervals of the mean over seeds.

    The exit code is 0 if all runs were made, 1 if some failed (they are named, the others are
    kept), 2 if options are wrong, 130 after an interruption.

    Args:
        runs: Which runs, and where they are kept.
        requests: What is asked for.
        machine_options: What serves them.
    """
    try:
        specs = grid(
            requests or RequestOptions(), machine_options or MachineOptions(),
            parse_axes(runs.over or []),
        )  # fmt: skip
        run = _runner(runs)
        runs.out.mkdir(parents=True, exist_ok=True)  # the other targets may lie in it
        check_targets(json=runs.json, html=runs.html)
        with _progress(len(specs), quiet=runs.json == STDOUT) as on_cell:
            cells = sweep(specs, runs.out, run, fresh=runs.fresh, on_cell=on_cell)
        _write(cells, runs)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"penstock sweep: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(
            f"penstock sweep: interrupted; {runs.out} holds what was done, and the same command "
            "goes on from there\n"
        )
        return _INTERRUPTED
    return 1 if any(cell.error is not None for cell in cells) else 0


def _runner(runs: GridOptions) -> Runner:
    """Processes here, or a Ray cluster.

    Raises:
        ValueError: both, or there is no Ray; names the option.
    """
    if runs.ray is None:
        workers = default_workers() if runs.jobs is None else runs.jobs
        return partial(outcomes, workers=workers)
    if runs.jobs is not None:
        msg = f"--jobs {runs.jobs}: with --ray, Ray says how many run at a time"
        raise ValueError(msg)
    if importlib.util.find_spec("ray") is None:
        msg = f"--ray {runs.ray} needs Ray: pip install 'penstock[ray]'"
        raise ValueError(msg)
    from penstock.sim.on_ray import ray_outcomes

    return partial(ray_outcomes, address=None if runs.ray == "local" else runs.ray)


def to_dict(cells: Sequence[Cell]) -> dict[str, object]:
    """A sweep as plain data: what ``sweep.json`` and ``--json`` hold."""
    return {
        "schema": SCHEMA,
        "penstock": __version__,
        "command": command_line(),
        "machine": machine(),
        "failed": sum(cell.error is not None for cell in cells),
        "cells": [
            {
                **msgspec.to_builtins(cell),
                "policy": cell.spec.policy_name,
                "load": cell.spec.load,
                "load_unit": cell.spec.load_unit,
            }
            for cell in cells
        ],
        "groups": [
            {
                **{k: v for k, v in msgspec.to_builtins(group).items() if k != "spec"},
                "policy": group.spec.policy_name,
                "load": group.spec.load,
                "load_unit": group.spec.load_unit,
            }
            for group in groups(cells)
        ],
    }


def _write(cells: Sequence[Cell], runs: GridOptions) -> None:
    data = to_dict(cells)
    write_json(data, str(runs.out / "sweep.json"))
    frame(cells).write_parquet(runs.out / "sweep.parquet")
    if runs.html is not None:
        from penstock.sim import report

        report.sweep_report(cells, runs.html, runs.show)
    if runs.json is not None:
        write_json(data, runs.json)
    if runs.json == STDOUT:
        return
    from rich.console import Console

    console = Console()
    console.print(table(cells))
    for cell in cells:
        if cell.error is not None:
            line = f"failed: {cell.spec.policy_name}, {cell.spec.load:g} {cell.spec.load_unit}, "
            line += f"seed {cell.spec.seed}: {cell.error}"
            console.print(line, highlight=False, markup=False)
    notes = {note for cell in cells if cell.result for note in cell.result.notes}
    if len({cell.spec.seed for cell in cells}) > 1:
        notes |= {SAME_LOAD for cell in cells if cell.spec.arrivals == "trace"}
    for note in sorted(notes):
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"in {runs.out}: sweep.json, sweep.parquet", highlight=False, markup=False)


def table(cells: Sequence[Cell]) -> Table:
    """A row per group of seeds."""
    from rich.table import Table

    names = varying([cell.spec for cell in cells])
    rows = [_columns(group, names) for group in groups(cells)]
    seeds = len({cell.spec.seed for cell in cells})
    title = f"{len(cells)} runs" + (
        f", mean ± 95 % interval over {seeds} seeds" if seeds > 1 else ""
    )
    view = Table(title=title, title_justify="left")
    for i, head in enumerate(rows[0] if rows else ()):
        view.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        view.add_row(*row.values())
    return view


def _columns(group: Group, names: Sequence[str]) -> dict[str, str]:
    spec = group.spec
    return {
        "policy": spec.policy_name,
        spec.load_unit: f"{spec.load:g}",
        **{name: _plain(getattr(spec, name)) for name in names},
        "goodput tok/s": _number(group.goodput_output_tps),
        "attainment": "-" if group.attainment is None else _percent(group.attainment),
        "p99 ttft": seconds(group.p99.get("ttft")),
        "p99 gap": seconds(group.p99.get("gap")),
        "evicted": share(None if group.evicted_ratio is None else group.evicted_ratio.mean),
        "KV used": share(group.memory.mean),
    }


def _number(value: Interval) -> str:
    half = value.half
    return f"{value.mean:.0f} ± {half:.0f}" if half else f"{value.mean:.0f}"


def _percent(value: Interval) -> str:
    half = value.half
    return f"{share(value.mean)} ± {100 * half:.1f}" if half else share(value.mean)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[Cell], None] | None]:
    """A bar on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("runs", total=total)
        failed = 0

        def advance(cell: Cell) -> None:
            nonlocal failed
            failed += cell.error is not None
            bar.update(task, advance=1, description=f"runs ({failed} failed)" if failed else "runs")

        yield advance
