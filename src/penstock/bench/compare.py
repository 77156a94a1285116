"""Several schedulers on one load, side by side: table, figure, HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.bench import html
from penstock.bench.result import Result, machine, seconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

COLORS: Mapping[str, str] = {
    "tgi": "#8d99ae",
    "vllm": "#c8553d",
    "past-future-artifact": "#5aa48a",
    "past-future": "#2a7f62",
    "past-future-adaptive": "#b5651d",
    "oracle": "#33415c",
}
NAMES: Mapping[str, str] = {
    "tgi": "tgi (conservative)",
    "vllm": "vllm (aggressive)",
    "past-future-artifact": "past-future (artifact)",
    "past-future": "past-future",
    "past-future-adaptive": "past-future (adaptive)",
    "oracle": "oracle (knows lengths)",
}
HEAD = (
    "scheduler", "goodput tok/s", "attainment", "throughput tok/s", "p99 TTFT", "p99 gap",
    "evictions", "KV used",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One scheduler's result."""

    preset: str
    result: Result

    @property
    def name(self) -> str:
        """Its name, for people."""
        return NAMES.get(self.preset, self.preset)

    def p99(self, latency: str) -> float | None:
        """The 99th percentile of a latency over completed attempts."""
        row = self.result.summary.percentiles.get(latency)
        return None if row is None else row["p99"]

    def cells(self) -> tuple[str, ...]:
        """The columns of ``HEAD``."""
        summary, server = self.result.summary, self.result.server
        return (
            self.name,
            f"{summary.goodput_output_tps:.0f}",
            share(summary.attainment),
            f"{summary.throughput_output_tps:.0f}",
            seconds(self.p99("ttft")),
            seconds(self.p99("gap")),
            "-" if server.evictions is None else str(server.evictions),
            share(server.kv_use_mean),
        )


def table(entries: Sequence[Entry], title: str) -> Table:
    """For a terminal; the best goodput that did not know the lengths stands out."""
    from rich.table import Table

    view = Table(title=title, title_justify="left")
    for i, head in enumerate(HEAD):
        view.add_column(head, justify="left" if i == 0 else "right")
    fair = [e for e in entries if e.preset != "oracle"]
    best = max(fair, key=lambda e: e.result.summary.goodput_output_tps, default=None)
    for entry in entries:
        view.add_row(*entry.cells(), style="bold green" if entry is best else None)
    return view


def figure(entries: Sequence[Entry], title: str) -> Figure:
    """Goodput within throughput, attainment, latency distributions and KV memory."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 7), layout="constrained")
    drawn.suptitle(title)
    (a, b, c), (d, e, f) = drawn.subplots(2, 3)
    _goodput(a, entries)
    _bars(
        b, entries, "attainment", [100 * (x.result.summary.attainment or 0) for x in entries], "%"
    )
    _bars(c, entries, "evictions", [x.result.server.evictions or 0 for x in entries], "")
    _cumulative(d, entries, "ttft", "time to first token")
    _cumulative(e, entries, "gap", "largest gap between tokens")
    for entry in entries:
        series = entry.result.server.kv_series
        if series:
            f.plot(*zip(*series, strict=True), color=_color(entry), label=entry.preset, lw=1)
    f.set(title="KV memory in use", xlabel="seconds", ylabel="share", ylim=(0, 1.05))
    return drawn


def write(
    entries: Sequence[Entry], title: str, lead: Sequence[str], folder: Path, stem: str
) -> tuple[Path, Path]:
    """Write ``stem.png`` and ``stem.html``; returns their paths."""
    picture = figure(entries, title)
    png, page = folder / f"{stem}.png", folder / f"{stem}.html"
    picture.savefig(png, dpi=120)
    facts = [(str(k), str(v)) for k, v in machine().items()]
    notes = list(entries[0].result.notes if entries else ())
    text = html.page(
        title,
        lead=lead,
        tables=[(HEAD, [e.cells() for e in entries]), ((), facts)],
        figures=[picture],
        notes=notes,
    )
    page.write_text(text, encoding="utf-8")
    return png, page


def _goodput(axes: Axes, entries: Sequence[Entry]) -> None:
    total = [e.result.summary.throughput_output_tps for e in entries]
    good = [e.result.summary.goodput_output_tps for e in entries]
    names = [e.preset for e in entries]
    axes.bar(names, total, color="none", edgecolor="#bbb", label="throughput")
    bars = axes.bar(names, good, color=[_color(e) for e in entries], label="goodput")
    axes.bar_label(bars, fmt="%.0f")
    axes.set(title="goodput (filled) of throughput", ylabel="output tok/s")


def _bars(
    axes: Axes, entries: Sequence[Entry], title: str, values: Sequence[float], unit: str
) -> None:
    bars = axes.bar([e.preset for e in entries], values, color=[_color(e) for e in entries])
    axes.bar_label(bars, fmt=f"%.0f{unit.replace('%', '%%')}")
    axes.set(title=title)
    axes.margins(y=0.12)


def _cumulative(axes: Axes, entries: Sequence[Entry], name: str, title: str) -> None:
    for entry in entries:
        values = sorted(
            value
            for attempt in entry.result.attempts
            if (value := getattr(attempt.latency, name)) is not None
        )
        heights = [(i + 1) / len(values) for i in range(len(values))]
        axes.step(values, heights, color=_color(entry), label=entry.preset)
    for slo_class in entries[0].result.classes if entries else ():
        bound = getattr(slo_class.slo, name)
        if bound is not None:
            axes.axvline(bound, color="#222", linestyle="--", lw=1)
    axes.set(title=f"{title} (dashed: bound)", xlabel="seconds", xscale="log", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize="small")


def _color(entry: Entry) -> str:
    return COLORS.get(entry.preset, "#777")
