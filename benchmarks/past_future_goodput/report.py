"""What came of the cells: tables, and the figure of 12 panels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cells import LOADS, MACHINES, MAIN, SERIES, Cell, series_of
from matplotlib.figure import Figure

from penstock.bench.compare import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLUMNS = (
    "model", "load", "ratio, at clients", "at most clients", "cold", "as the artifact",
    "late given up", "oracle", "late, oracle", "adaptive", "adaptive, oracle",
)  # fmt: skip
GIVEN_UP = ("past-future, late given up", "vllm, late given up")
ADAPTIVE = "past-future-adaptive"


@dataclass(frozen=True)
class Panel:
    """Goodput by series and clients, of one model on one load; mean over the seeds there are."""

    machine: str
    load: str
    clients: tuple[int, ...]
    curves: Mapping[str, tuple[float, ...]]
    seeds: Mapping[str, int]

    def ratios(
        self, ours: str = "past-future", others: Sequence[str] = ("tgi", "vllm")
    ) -> list[float]:
        """Ours to the best of the others, by clients; infinite where theirs is 0."""
        best = [max(values) for values in zip(*(self.curves[name] for name in others), strict=True)]
        pairs = zip(self.curves[ours], best, strict=True)
        return [mine / theirs if theirs else float("inf") for mine, theirs in pairs]


def panels(rows: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> list[Panel]:
    """Sum cells up; seeds that lack cells of a curve do not count for it."""
    made = []
    for gpu in MACHINES:
        for load in LOADS:
            curves, counted = {}, {}
            for series in SERIES:
                whole = []
                for seed in seeds:
                    keys = [
                        Cell(gpu.name, load.name, clients, series.name, seed).key
                        for clients in gpu.clients
                    ]
                    if all(key in rows for key in keys):
                        whole.append([rows[key]["goodput"] for key in keys])
                if whole:
                    curves[series.name] = tuple(map(statistics.fmean, zip(*whole, strict=True)))
                    counted[series.name] = len(whole)
            made.append(Panel(gpu.name, load.name, gpu.clients, curves, counted))
    return made


def figure(made: Sequence[Panel]) -> Figure:
    """The 12 panels."""
    drawn = Figure(figsize=(15, 9), layout="constrained")
    grid = drawn.subplots(len(MACHINES), len(LOADS), squeeze=False)
    for panel, axes in zip(made, grid.flat, strict=True):
        _draw(panel, axes)
    grid[0][0].legend(frameon=False, fontsize="small")
    for row in grid:
        row[0].set_ylabel("goodput, prompt and output tok/s")
    for axes in grid[-1]:
        axes.set_xlabel("clients")
    return drawn


def _draw(panel: Panel, axes: Axes) -> None:
    for name in (*MAIN, *GIVEN_UP, ADAPTIVE):
        if name not in panel.curves:
            continue
        color = COLORS[series_of(name).preset]
        style = ":" if name == "oracle" else "--" if name in GIVEN_UP else "-"
        width = 0.9 if name in GIVEN_UP else 1.6
        line: dict[str, Any] = {"marker": "o", "ms": 3, "lw": width, "color": color, "label": name}
        axes.plot(panel.clients, panel.curves[name], style, **line)
    ratio = max(panel.ratios())
    title = f"{panel.machine}, {panel.load}: up to {ratio:.2f} times"
    axes.set_title(title, fontsize="medium")
    axes.set_ylim(0, None)


def markdown(made: Sequence[Panel], facts: Mapping[str, object]) -> str:
    """The tables as a page."""
    best = max(made, key=lambda panel: max(panel.ratios()))
    lines = [
        "# Goodput of the Past-Future paper's figure 7, simulated",
        "",
        "Prompt and output tokens per second of good requests; method and terms are in",
        "`benchmarks/past_future_goodput/run.py`. The ratio is `past-future` to the better of",
        "`tgi` and `vllm` with the same number of clients; `cold` is the largest of",
        "`past-future, cold`. `as the artifact` is the largest of `past-future, late given up` to",
        "the same two, since the paper's servers give up late requests except under the aggressive",
        "scheduler; `late given up` is against `tgi` and `vllm, late given up`. `oracle` is",
        "`past-future` to it at most clients, `late, oracle` that of `past-future, late given up`.",
        "`adaptive` is `past-future-adaptive` to `past-future` at most clients, and to the oracle.",
        "Where curves are of fewer seeds than others, their number is given.",
        "",
        f"Largest ratio: **{max(best.ratios()):.2f}** ({best.machine}, {best.load}).",
        "",
        *(f"- {name}: `{value}`" for name, value in facts.items()),
        "",
        "![goodput](goodput.png)",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --- |" * (len(COLUMNS) - 1),
    ]
    for panel in made:
        ratios = panel.ratios()
        cold = _largest(panel, "past-future, cold", "tgi", "vllm")
        artifact = _largest(panel, GIVEN_UP[0], "tgi", "vllm")
        given_up = _largest(panel, GIVEN_UP[0], "tgi", GIVEN_UP[1])
        top = max(ratios)
        at = panel.clients[ratios.index(top)]
        share = _last(panel, "past-future")
        lines.append(
            f"| {panel.machine} | {panel.load} | {top:.2f}, {at} | {ratios[-1]:.2f} | "
            f"{cold} | {artifact} | {given_up} | {share} | {_last(panel, GIVEN_UP[0])} | "
            f"{_last(panel, ADAPTIVE, 'past-future')} | {_last(panel, ADAPTIVE)} |"
        )
    for panel in made:
        lines += ["", f"## {panel.machine}, {panel.load}", ""]
        lines += ["| clients | " + " | ".join(map(str, panel.clients)) + " |"]
        lines += ["| --- |" + " --- |" * len(panel.clients)]
        for name, values in panel.curves.items():
            few = panel.seeds[name] < max(panel.seeds.values())
            label = f"{name} (seeds: {panel.seeds[name]})" if few else name
            lines.append(f"| {label} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
        lines.append("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in panel.ratios()) + " |")
    return "\n".join(lines) + "\n"


def _largest(panel: Panel, ours: str, *others: str) -> str:
    known = {ours, *others} <= panel.curves.keys()
    return f"{max(panel.ratios(ours, others)):.2f}" if known else "-"


def _last(panel: Panel, ours: str, other: str = "oracle") -> str:
    """Ours to the other, at most clients."""
    return f"{panel.ratios(ours, (other,))[-1]:.2f}" if ours in panel.curves else "-"
