"""The study's picture: load, ladder, length of the slice, number of instances."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from penstock.core.policies.fleets import FLEETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    "sls": ("#8c8c8c", "-"),
    "ils": ("#c47f2c", "-"),
    "scls": ("#2b6cb0", "-"),
    "scls paged": ("#2b6cb0", "--"),
    "vllm": ("#b83280", "-"),
    "scls-kv": ("#000000", ":"),
    "past-future": ("#2f855a", "-"),
}
Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Draw and save."""
    figure = Figure(figsize=(14, 10), layout="constrained")
    axes = figure.subplots(3, 3)
    for line, lengths in zip(axes, ("sharegpt", "azure-conversation"), strict=False):
        load = [row for row in rows if row["part"] == "rates" and row["lengths"] == lengths]
        for axis, (key, title) in zip(
            line,
            (
                ("throughput", "throughput, requests/s"),
                ("mean_response", "mean response, s"),
                ("p95_response", "p95 response, s"),
            ),
            strict=True,
        ):
            _lines(axis, load, "rate", key)
            axis.set(title=f"{lengths}: {title}", xlabel="requests/s offered", ylim=(0, None))
    axes[0][0].legend(fontsize=8)
    _ladder(axes[2][0], rows)
    _slices(axes[2][1], rows)
    scale = [row for row in rows if row["part"] == "instances"]
    _lines(axes[2][2], scale, "instances", "throughput")
    axes[2][2].set(
        title="4 requests/s per instance: throughput", xlabel="instances", xscale="log",
        yscale="log",
    )  # fmt: skip
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _lines(axis: Axes, rows: list[Row], x: str, y: str) -> None:
    for label, (color, style) in LINES.items():
        points = sorted((row[x], row[y]) for row in rows if row["label"] == label)
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, marker="o", ms=3, label=label)


def _ladder(axis: Axes, rows: list[Row]) -> None:
    names = ("sls", *FLEETS, "ils", "vllm")
    for offset, lengths in enumerate(("sharegpt", "azure-conversation")):
        by = {
            row["label"]: row["throughput"]
            for row in rows
            if row["part"] == "rates" and row["lengths"] == lengths and row["rate"] == 60
        }
        places = [index + 0.4 * offset for index in range(len(names))]
        axis.barh(places, [by[name] for name in names], 0.38, label=lengths)
    axis.set_yticks([index + 0.2 for index in range(len(names))], names)
    axis.invert_yaxis()
    axis.set(title="60 requests/s offered: throughput")
    axis.legend(fontsize=8)


def _slices(axis: Axes, rows: list[Row]) -> None:
    for lengths in ("sharegpt", "azure-conversation"):
        part = [row for row in rows if row["part"] == "slice" and row["lengths"] == lengths]
        points = [(int(row["label"].rpartition("=")[2]), row["throughput"]) for row in part]
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=lengths)
    axis.set(
        title="scls at 40 requests/s: throughput", xlabel="slice, tokens", xscale="log",
        ylim=(0, None),
    )  # fmt: skip
    axis.set_xticks([32, 64, 128, 256, 512], ["32", "64", "128", "256", "512"])
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=8)
