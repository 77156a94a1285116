"""Reports of simulated runs: numbers, and what happened over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from penstock.bench.goodput import BOUNDS, Attempt
from penstock.bench.result import seconds, share
from penstock.bench.workload import Workload
from penstock.sim import figures
from penstock.sim.figures import Curve, Timeline, colour, svg
from penstock.sim.interval import SAME_LOAD
from penstock.sim.outcome import attempt_of
from penstock.sim.page import Key, Picture, Section, Table, write
from penstock.sim.result import ClassResult
from penstock.sim.simulation import Simulation, simulation_of
from penstock.sim.spec import RunSpec, workload_of
from penstock.sim.sweep import Cell, Group, groups, varying

_LONG = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "gap": "largest time between two tokens",
    "e2e": "time to last token",
}


def simulations(done: Sequence[Simulation], path: Path) -> None:
    """The report of runs over the same requests, made with ``observe``.

    Raises:
        OSError: it cannot be written.
    """
    first = done[0]
    lead = [f"{len(first.workload):,} requests: {first.workload.source}. {_setting(first.spec)}"]
    sections = [
        Section(tables=[_summary_table(done)]),
        _latencies(done),
        *(_over_time(one) for one in done),
        _classes_section([(one.spec.policy_name, one.summary.classes) for one in done]),
    ]
    notes = [*first.summary.notes, *_about(first.spec)]
    settings = msgspec.to_builtins(first.spec)
    write(path, "Simulated serving", sections, lead=lead, notes=notes, settings=settings)


def sweep_report(cells: Sequence[Cell], path: Path, show: float | None = None) -> None:
    """The report of a sweep: everything against load, and what happened at one load.

    Args:
        cells: of the sweep.
        path: where to.
        show: the load at which runs are made once more and drawn over time; by default the one
            at which policies differ most.

    Raises:
        ValueError: there is no such load, or nothing to report.
        OSError: it cannot be written, or the trace cannot be read.
    """
    found = groups(cells)
    if not found:
        msg = "no run of the sweep succeeded; there is nothing to report"
        raise ValueError(msg)
    lines = _lines(found, varying([cell.spec for cell in cells]))
    unit = found[0].spec.load_unit
    load = _shown(found) if show is None else show
    there = [group for group in found if math.isclose(group.spec.load, load)]
    if not there:
        known = ", ".join(f"{x:g}" for x in sorted({group.spec.load for group in found}))
        msg = f"show is {load:g}; the sweep has the loads {known}"
        raise ValueError(msg)
    sections = [_against_load(lines, unit), *_at_load(there, load, unit), _load_table(lines, unit)]
    seeds = len({cell.spec.seed for cell in cells})
    lead = [f"{len(cells)} runs, {_requests(found[0].spec)}. {_setting(found[0].spec)}"]
    notes = sorted({note for cell in cells if cell.result for note in cell.result.notes})
    notes += [
        f"failed: {cell.spec.policy_name}, {cell.spec.load:g} {unit}, seed {cell.spec.seed}: "
        f"{cell.error}"
        for cell in cells
        if cell.error is not None
    ]
    notes += _about(found[0].spec)
    if any(group.spec.pooled for group in there):
        notes.append("what happened over time is not drawn for runs with a dispatcher")
    if seeds > 1:
        notes.append("bands and ± are Student's 95 % intervals of the mean over seeds")
        if found[0].spec.arrivals == "trace":
            notes.append(SAME_LOAD)
    settings = msgspec.to_builtins(found[0].spec)
    write(path, "Goodput against load", sections, lead=lead, notes=notes, settings=settings)


def _setting(spec: RunSpec) -> str:
    """One sentence on the machine and the promise."""
    machine = f"{spec.kv_tokens:,} KV tokens"
    machine += ", steps only" if spec.profile is None else f", step times of {spec.profile}"
    if spec.instances > 1:
        machine += f", {spec.instances} instances"
    promise = f" SLO in seconds: {'; '.join(spec.slo)}." if spec.slo else " No SLO."
    return f"{machine}.{promise}"


def _requests(spec: RunSpec) -> str:
    """How many of what."""
    count = f"{spec.requests:,} " if spec.requests is not None else ""
    source = (
        spec.trace or spec.lengths or f"prompt {spec.input}, output {spec.output or spec.input}"
    )
    return f"{count}requests each: {source}"


def _unit(spec: RunSpec) -> str:
    return "steps" if spec.steps_only else "seconds"


def _summary_table(done: Sequence[Simulation]) -> Table:
    rows = []
    for one in done:
        s = one.summary
        p99 = [seconds(s.latency[n]["p99"]) if n in s.latency else "-" for n in BOUNDS]
        rows.append(
            [
                one.spec.policy_name, f"{s.goodput_output_tps:,.1f}", share(s.attainment),
                f"{s.throughput_output_tps:,.1f}", *p99, share(s.evicted_ratio), share(s.memory),
                f"{s.finished:,}",
            ]
        )  # fmt: skip
    head = ["policy", "goodput tok/s", "attainment", "throughput tok/s"]
    head += [f"p99 {name}" for name in BOUNDS]
    return Table([*head, "evicted", "KV used", "finished"], rows)


def _latencies(done: Sequence[Simulation]) -> Section:
    attempts = {one.spec.policy_name: _attempts(one) for one in done}
    unit = _unit(done[0].spec)
    key = [Key(name, colour(i)) for i, name in enumerate(attempts)]
    pictures = []
    for name in ("ttft", "gap"):
        bounds = [b for c in done[0].workload.classes if (b := getattr(c.slo, name)) is not None]
        drawn = figures.distribution(attempts, name, sorted(bounds), unit)
        dash = [Key("bound of the SLO", "bad", "dash")] if bounds else []
        title = _LONG[name].capitalize()
        pictures.append(
            Picture(title, "share of completed requests within it", svg(drawn, title), key + dash)
        )
    return Section("Latencies", figures=pictures)


def _over_time(one: Simulation) -> Section:
    rows = _attempts(one, instance=0)
    line = Timeline(one.runs[0], one.observations[0], rows)
    text = []
    if len(one.runs) > 1:
        text.append(f"The first of {len(one.runs)} instances.")
    return Section(f"Over time: {one.spec.policy_name}", text, _timeline(line, _unit(one.spec)))


def _timeline(line: Timeline, unit: str) -> list[Picture]:
    key = [Key("held (most within an interval)", "area")]
    text = "Memory that requests hold."
    forecasts = line.observation.forecasts
    if forecasts:
        text = (
            "Memory that requests hold, and the peak that those running were forecast to need "
            "(median, 10 to 90 %), over the peak that they then truly needed."
        )
        if max(forecast.high for forecast in forecasts) > figures.cut(line):
            text += f" Cut off at {figures.cut(line) / line.observation.blocks:.0%}."
        key += [
            Key("forecast peak", "s1"),
            Key("its 10 to 90 %", "s1", "band"),
            Key("true peak", "s2"),
        ]
    total, drawn = line.run.evictions, len(line.observation.evictions)
    lost = f"{total:,} in all: memory taken back, and computed again later." if total else "None."
    if drawn < total:
        lost += f" {total - drawn:,} of them, evicted at once, are not drawn."
    return [
        Picture(
            "KV memory and forecast", text, svg(figures.memory(line, unit), "KV memory over time"),
            [*key, Key("capacity", "bad", "dash")],
        ),
        Picture(
            "Queue age", "How long the request that waits longest has waited by then.",
            svg(figures.queue(line, unit), "queue age over time"),
        ),
        Picture(
            "Evictions",
            lost,
            svg(figures.evictions(line, unit), "evictions over time"),
        ),
        Picture(
            "Output, by when requests ended", "Tokens of requests within their SLO, and of others.",
            svg(figures.output(line, unit), "output over time"),
            [Key("within the SLO", "good"), Key("missed it", "bad")],
        ),
    ]  # fmt: skip


def _classes_section(parts: Sequence[tuple[str, dict[str, ClassResult]]]) -> Section:
    rows = [
        [
            policy, name, f"{part.attempts:,}", share(part.attainment),
            f"{part.goodput_output_tps:,.1f}", *(str(part.broken.get(b, 0)) for b in BOUNDS),
        ]
        for policy, classes in parts
        for name, part in classes.items()
    ]  # fmt: skip
    head = ["policy", "class", "attempts", "attainment", "goodput tok/s"]
    return Section("By class", tables=[Table([*head, *(f"broke {b}" for b in BOUNDS)], rows)])


def _attempts(one: Simulation, instance: int | None = None) -> list[Attempt]:
    runs = one.runs if instance is None else one.runs[instance : instance + 1]
    return [attempt_of(record) for run in runs for record in run.records]


def _about(spec: RunSpec) -> list[str]:
    notes = []
    if spec.steps_only:
        notes.append("a decode step is the unit of time: read steps for seconds")
    if spec.instances == 1:
        note = "the forecast is Past-Future's, from the output lengths that had ended by then"
        notes.append(f"{note}, also where another policy decides")
    return notes


class _Line(NamedTuple):
    """A curve's groups, by load."""

    name: str
    groups: list[Group]


def _lines(found: Sequence[Group], names: Sequence[str]) -> list[_Line]:
    """Groups that differ in their load only."""
    by_name: dict[str, list[Group]] = {}
    for group in found:
        extra = [f"{name} {getattr(group.spec, name)}" for name in names]
        by_name.setdefault(", ".join((group.spec.policy_name, *extra)), []).append(group)
    return [
        _Line(name, sorted(members, key=lambda group: group.spec.load))
        for name, members in by_name.items()
    ]


def _against_load(lines: Sequence[_Line], unit: str) -> Section:
    key = [Key(line.name, colour(i)) for i, line in enumerate(lines)]

    def drawn(title: str, text: str, name: str, ylabel: str, *, percent: bool = False) -> Picture:
        curves = [
            Curve(
                line.name,
                [group.spec.load for group in line.groups],
                [getattr(group, name) for group in line.groups],
            )
            for line in lines
        ]
        picture = figures.against_load(curves, unit, ylabel, share=percent)
        return Picture(title, text, svg(picture, f"{title} against load"), key)

    return Section(
        figures=[
            drawn(
                "Goodput", "Output tokens per second of requests within their SLO.",
                "goodput_output_tps", f"tokens per {_unit(lines[0].groups[0].spec)[:-1]}",
            ),
            drawn(
                "Attainment", "Share of the requests that met their SLO.", "attainment",
                "share of requests", percent=True,
            ),
            drawn(
                "Evictions", "Per finished request.", "evicted_ratio", "evictions per request",
            ),
            drawn("KV memory", "Mean share in use.", "memory", "share of memory", percent=True),
        ]
    )  # fmt: skip


def _shown(found: Sequence[Group]) -> float:
    """The load at which attainments differ most; of equal ones the largest."""
    by_load: dict[float, list[float]] = {}
    for group in found:
        mean = group.attainment.mean if group.attainment else 0.0
        by_load.setdefault(group.spec.load, []).append(mean)
    return max(by_load, key=lambda load: (max(by_load[load]) - min(by_load[load]), load))


def _at_load(there: Sequence[Group], load: float, unit: str) -> list[Section]:
    """What happened over time at one load: its first seed, run once more, and watched if it can."""
    sections, classes = [], []
    workloads: dict[bytes, Workload] = {}
    for group in there:
        fields = msgspec.to_builtins(group.spec) | {"preset": "", "parameters": {}}
        workload = workloads.setdefault(msgspec.json.encode(fields), workload_of(group.spec))
        one = simulation_of(group.spec, workload, observe=not group.spec.pooled)
        classes.append((group.spec.policy_name, one.summary.classes))
        if group.spec.pooled:
            continue
        part = _over_time(one)
        where = f"{load:g} {unit}, seed {group.spec.seed}"
        sections.append(Section(f"{part.title}, at {where}", part.text, part.figures))
    last = _classes_section(classes)
    return [*sections, Section(f"By class, at {load:g} {unit}", tables=last.tables)]


def _load_table(lines: Sequence[_Line], unit: str) -> Section:
    rows = []
    for line in lines:
        for group in line.groups:
            goodput, met = group.goodput_output_tps, group.attainment
            rows.append(
                [
                    line.name, f"{group.spec.load:g}", _pm(goodput.mean, goodput.half, 1),
                    "-" if met is None else f"{_pm(100 * met.mean, 100 * (met.half or 0), 1)} %",
                    *(seconds(group.p99.get(name)) for name in BOUNDS),
                    share(group.evicted_ratio.mean if group.evicted_ratio else None),
                    share(group.memory.mean),
                ]
            )  # fmt: skip
    head = ["policy", unit, "goodput tok/s", "attainment", *(f"p99 {name}" for name in BOUNDS)]
    return Section("All loads", tables=[Table([*head, "evicted", "KV used"], rows)])


def _pm(mean: float, half: float | None, digits: int) -> str:
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {half:,.{digits}f}" if half else text
