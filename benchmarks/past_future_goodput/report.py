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


@dataclass(frozen=True)
class Panel:
    """Goodput by series and clients (mean over seeds), of one model on one load."""

    machine: str
    load: str
    clients: tuple[int, ...]
    curves: Mapping[str, tuple[float, ...]]

    def ratios(
        self, ours: str = "past-future", others: Sequence[str] = ("tgi", "vllm")
    ) -> list[float]:
        """Ours to the best of the others, by clients; infinite where theirs is 0."""
        best = [max(values) for values in zip(*(self.curves[name] for name in others), strict=True)]
        pairs = zip(self.curves[ours], best, strict=True)
        return [mine / theirs if theirs else float("inf") for mine, theirs in pairs]


def panels(rows: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> list[Panel]:
    """Sum cells up; curves with missing cells are left out."""
    made = []
    for gpu in MACHINES:
        for load in LOADS:
            curves = {}
            for series in SERIES:
                keys = [
                    [Cell(gpu.name, load.name, clients, series.name, seed).key for seed in seeds]
                    for clients in gpu.clients
                ]
                if all(key in rows for group in keys for key in group):
                    curves[series.name] = tuple(
                        statistics.fmean(rows[key]["goodput"] for key in group) for group in keys
                    )
            made.append(Panel(gpu.name, load.name, gpu.clients, curves))
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
    for name in (*MAIN, "past-future, cold", "vllm, late given up"):
        if name not in panel.curves:
            continue
        color = COLORS[series_of(name).preset]
        style = ":" if name == "oracle" else "-" if name in MAIN else "--"
        width = 1.6 if name in MAIN else 0.9
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
        "`past-future, cold`,",
        "`late given up` the largest of `past-future, late given up` to the better of `tgi` and",
        "`vllm, late given up`; `oracle` is `past-future` to it at most clients.",
        "",
        f"Largest ratio: **{max(best.ratios()):.2f}** ({best.machine}, {best.load}).",
        "",
        *(f"- {name}: `{value}`" for name, value in facts.items()),
        "",
        "![goodput](goodput.png)",
        "",
        "| model | load | ratio, at clients | at most clients | cold | late given up | oracle |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for panel in made:
        ratios = panel.ratios()
        cold = _largest(panel, "past-future, cold", "tgi", "vllm")
        given_up = _largest(panel, "past-future, late given up", "tgi", "vllm, late given up")
        top = max(ratios)
        at = panel.clients[ratios.index(top)]
        share = panel.ratios(others=("oracle",))[-1]
        lines.append(
            f"| {panel.machine} | {panel.load} | {top:.2f}, {at} | {ratios[-1]:.2f} | "
            f"{cold} | {given_up} | {share:.2f} |"
        )
    for panel in made:
        lines += ["", f"## {panel.machine}, {panel.load}", ""]
        lines += ["| clients | " + " | ".join(map(str, panel.clients)) + " |"]
        lines += ["| --- |" + " --- |" * len(panel.clients)]
        for name, values in panel.curves.items():
            lines.append(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
        lines.append("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in panel.ratios()) + " |")
    return "\n".join(lines) + "\n"


def _largest(panel: Panel, ours: str, *others: str) -> str:
    known = {ours, *others} <= panel.curves.keys()
    return f"{max(panel.ratios(ours, others)):.2f}" if known else "-"
