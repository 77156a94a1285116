"""Figures of the simulator's reports: small, without words inside that a caption can say better.

Their colours are placeholders, which :func:`svg` replaces by variables of the page's style sheet,
so that one picture serves a light and a dark page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from penstock.bench.goodput import Attempt, End
from penstock.sim.interval import Interval
from penstock.sim.observe import Observation
from penstock.sim.run import Run

Floats = NDArray[np.float64]

COLOURS = {
    "#010101": "ink",
    "#020202": "grid",
    "#030303": "area",
    "#040404": "bad",
    "#050505": "good",
    "#110000": "s1",
    "#120000": "s2",
    "#130000": "s3",
    "#140000": "s4",
    "#150000": "s5",
    "#160000": "s6",
}
"""Placeholder colours and the variables that they stand for; ``s1`` to ``s6`` are series."""

_BY_NAME = {name: colour for colour, name in COLOURS.items()}
_SIZE = (4.7, 2.7)
_BINS = 360
_MARKERS = "osD^vP"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "penstock",
    "font.size": 9,
    "axes.edgecolor": _BY_NAME["grid"],
    "axes.labelcolor": _BY_NAME["ink"],
    "xtick.color": _BY_NAME["ink"],
    "ytick.color": _BY_NAME["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _BY_NAME["grid"],
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
}


class Curve(NamedTuple):
    """A series over loads: its name, loads in order, and a value or None at each."""

    name: str
    loads: Sequence[float]
    values: Sequence[Interval | None]


class Timeline(NamedTuple):
    """A run as figures draw it: ``observation`` and ``attempts`` are those of ``run``."""

    run: Run
    observation: Observation
    attempts: Sequence[Attempt]


def colour(place: int) -> str:
    """The variable of a series; they repeat after six."""
    return f"s{place % 6 + 1}"


def svg(figure: Figure, label: str) -> str:
    """A figure as inline SVG, with a label for those who cannot see it."""
    target = io.StringIO()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(
            target, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None}
        )
    text = target.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, name in COLOURS.items():
        text = text.replace(placeholder, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def against_load(curves: Sequence[Curve], unit: str, ylabel: str, *, share: bool = False) -> Figure:
    """Curves over load, with their intervals as bands."""
    figure, axes = _figure(unit, ylabel)
    for place, curve in enumerate(curves):
        points = [
            (load, value)
            for load, value in zip(curve.loads, curve.values, strict=True)
            if value is not None
        ]
        if not points:
            continue
        loads, values = zip(*points, strict=True)
        hue, mean = _BY_NAME[colour(place)], [value.mean for value in values]
        axes.plot(loads, mean, color=hue, marker=_MARKERS[place % 6], markersize=3.5, linewidth=1.4)
        if all(value.low is not None for value in values):
            low, high = ([value[side] for value in values] for side in (1, 2))
            if share:
                low, high = np.clip(low, 0, None), np.clip(high, None, 1)
            axes.fill_between(loads, low, high, color=hue, alpha=0.18, linewidth=0)
    axes.set_ylim(bottom=0)
    if share:
        _percent(axes)
        axes.set_ylim(0, 1.03)
    axes.set_xlim(left=0)
    return figure


def memory(line: Timeline, unit: str) -> Figure:
    """KV memory over time, and the forecast of its peak over what came of it."""
    figure, axes = _figure(unit, "share of KV memory")
    blocks = line.observation.blocks
    edges = _edges(line.run)
    middles = (edges[:-1] + edges[1:]) / 2
    held = most_held(line.observation, edges) / blocks
    axes.fill_between(middles, 0, held, color=_BY_NAME["area"], linewidth=0)
    forecasts = line.observation.forecasts
    if forecasts:
        at, under, middle, over, true = np.array(forecasts).T
        axes.fill_between(
            at, under / blocks, over / blocks, color=_BY_NAME["s1"], alpha=0.25, linewidth=0
        )
        axes.plot(at, middle / blocks, color=_BY_NAME["s1"], linewidth=0.9)
        axes.plot(at, true / blocks, color=_BY_NAME["s2"], linewidth=0.9)
    axes.axhline(1, color=_BY_NAME["bad"], linewidth=0.9, linestyle=(0, (4, 3)))
    _percent(axes)
    axes.set_ylim(0, min(axes.get_ylim()[1], cut(line) / blocks))
    axes.set_xlim(edges[0], edges[-1])
    return figure


def cut(line: Timeline) -> float:
    """Blocks above which a forecast is not drawn, so that what happened stays readable."""
    true = max((forecast.true for forecast in line.observation.forecasts), default=0.0)
    return max(2.0 * line.observation.blocks, 1.2 * true)


def queue(line: Timeline, unit: str) -> Figure:
    """How long the oldest waiting request has waited."""
    figure, axes = _figure(unit, unit)
    edges = _edges(line.run)
    age = line.observation.queue_age(line.run, edges)
    axes.fill_between(edges, 0, age, color=_BY_NAME["s3"], alpha=0.45, linewidth=0)
    axes.set_ylim(bottom=0)
    if not age.any():
        axes.set_ylim(0, 1)
    axes.set_xlim(edges[0], edges[-1])
    return figure


def evictions(line: Timeline, unit: str) -> Figure:
    """Evictions per interval of time."""
    figure, axes = _figure(unit, "evictions")
    edges = np.linspace(0, max(line.run.seconds, 1e-9), 61)
    counts, _ = np.histogram([at for at, _ in line.observation.evictions], edges)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BY_NAME["bad"], linewidth=0)
    axes.set_ylim(0, max(1, 1.05 * counts.max()))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(edges[0], edges[-1])
    return figure


def output(line: Timeline, unit: str) -> Figure:
    """Output tokens of requests by when they ended: in time, and too late."""
    figure, axes = _figure(unit, f"tokens per {'step' if unit == 'steps' else 'second'}")
    edges = np.linspace(0, max(line.run.seconds, 1e-9), 61)
    width = edges[1] - edges[0]
    ended = [a for a in line.attempts if a.end is not End.CUT]
    parts = []
    for met in (True, False):
        here = [a for a in ended if a.met is met]
        sums, _ = np.histogram(
            [a.ended for a in here], edges, weights=[a.output_tokens for a in here]
        )
        parts.append(sums / width)
    axes.bar(edges[:-1], parts[0], width, align="edge", color=_BY_NAME["good"], linewidth=0)
    axes.bar(
        edges[:-1], parts[1], width, bottom=parts[0], align="edge", color=_BY_NAME["bad"],
        linewidth=0,
    )  # fmt: skip
    axes.set_xlim(edges[0], edges[-1])
    return figure


def distribution(
    attempts: Mapping[str, Sequence[Attempt]], name: str, bounds: Sequence[float], unit: str
) -> Figure:
    """The share of completed requests with a latency of at most so much, and the SLO's bounds."""
    figure, axes = _figure(unit, "share of requests")
    largest = 0.0
    for place, rows in enumerate(attempts.values()):
        values = sorted(v for a in rows if (v := getattr(a.latency, name)) is not None)
        if values:
            # As many points as a picture shows.
            ranks = np.unique(np.linspace(0, len(values) - 1, 400).astype(int))
            shares = (ranks + 1) / len(values)
            axes.plot(np.array(values)[ranks], shares, color=_BY_NAME[colour(place)], linewidth=1.4)
            largest = max(largest, values[-1])
    for bound in bounds:
        axes.axvline(bound, color=_BY_NAME["bad"], linewidth=0.9, linestyle=(0, (4, 3)))
    most = max([largest, *bounds], default=1.0)
    if largest > 0 and most > 50 * (bounds[0] if bounds else math.inf):
        axes.set_xscale("symlog", linthresh=bounds[0])
        axes.xaxis.set_major_formatter(_plain)
    axes.set_xlim(0, most * 1.03 or 1)
    axes.set_ylim(0, 1.03)
    _percent(axes)
    return figure


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_formatter(_plain)
        axes.yaxis.set_major_formatter(_plain)
    return figure, axes


def _plain(value: float, place: float) -> str:
    del place
    return f"{value:,.10g}"


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _edges(run: Run) -> Floats:
    return np.linspace(0, max(run.seconds, 1e-9), _BINS + 1)


def most_held(observation: Observation, edges: Floats) -> Floats:
    """Most KV blocks held within each interval between rising times."""
    high = np.zeros(len(edges) - 1)
    last = len(high) - 1
    for step in observation.steps:
        first = min(last, int(np.searchsorted(edges, step.began, side="right")) - 1)
        until = min(last, int(np.searchsorted(edges, step.ended, side="right")) - 1)
        if first == until:
            high[first] = max(high[first], step.blocks_after)
            continue
        # A stretch grows evenly.
        here = slice(first, until + 1)
        share = (edges[1:][here] - step.began) / (step.ended - step.began)
        grown = step.blocks + (step.blocks_after - step.blocks) * np.clip(share, 0, 1)
        np.maximum(high[here], grown, out=high[here])
    return high
