"""From measured rounds to tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

METRICS = ("goodput", "throughput", "ttft_p50", "ttft_p99", "gap_p99")
NAMES = (*METRICS, "evicted")
BOUND, EVICTION_BOUND = 0.05, 0.02


def error(row: dict[str, Any], name: str, side: str = "sim") -> float:
    """Signed: relative, or in points for evictions."""
    seen, said = row["live"][name], row[side][name]
    if name == "evicted":
        return float(said - seen)
    return float(said / seen - 1) if seen else float("nan")


def line(row: dict[str, Any]) -> str:
    """A cell as it is compared."""
    parts = [f"{name} {row['live'][name]:.4g} ({error(row, name):+.1%})" for name in METRICS]
    parts.append(f"evicted {row['live']['evicted']:.1%} ({error(row, 'evicted'):+.1%})")
    return (
        f"{row['load']}, {row['preset']}: "
        + ", ".join(parts)
        + f"; steps {row['steps']}, sum {row['time_error']:+.1%}, slowness"
        f" {row['slowness'][0]:.2f} to {row['slowness'][1]:.2f}"
    )


def write(path: Path, out: Path) -> None:
    """Write results.json and results.md from the rounds."""
    rounds: list[dict[str, Any]] = [
        msgspec.json.decode(text) for text in path.read_bytes().splitlines()
    ]
    table = [_row([one["cells"][i] for one in rounds]) for i in range(len(rounds[0]["cells"]))]
    same = ("command", "commit", "processor", "cpus", "python", "platform", "model", "threads")
    data = {
        "rounds": len(rounds),
        "machine": {key: rounds[-1][key] for key in same if key in rounds[-1]},
        "profiles": [one["profile"] for one in rounds],
        "errors_held_out": [one["error_held_out"] for one in rounds],
        "cells": table,
    }
    text = msgspec.json.format(msgspec.json.encode(data), indent=1)
    (out / "results.json").write_bytes(text + b"\n")
    (out / "results.md").write_text(_markdown(rounds, table), encoding="utf-8")


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell over all rounds: medians of what was seen and said, and of the errors."""

    def each(pick: Callable[[str], float]) -> dict[str, float]:
        return {name: pick(name) for name in NAMES}

    return {
        "load": rows[0]["load"],
        "preset": rows[0]["preset"],
        "live": each(lambda name: median(row["live"][name] for row in rows)),
        "sim": each(lambda name: median(row["sim"][name] for row in rows)),
        "error": each(lambda name: median(error(row, name) for row in rows)),
        "steady_error": each(lambda name: median(error(row, name, "sim_steady") for row in rows)),
        "spread": each(lambda name: _spread([row["live"][name] for row in rows])),
        "errors": {name: [error(row, name) for row in rows] for name in NAMES},
        "time_error": median(row["time_error"] for row in rows),
        "host_share": median(row["host_share"] for row in rows),
    }


def _spread(values: list[float]) -> float:
    """Largest over smallest, less one: what the machine itself does between rounds."""
    return max(values) / min(values) - 1 if min(values) > 0 else max(values) - min(values)


def _markdown(rounds: list[dict[str, Any]], table: list[dict[str, Any]]) -> str:
    held = median(one["error_held_out"] for one in rounds)
    within = sum(
        abs(row["error"][name]) <= (EVICTION_BOUND if name == "evicted" else BOUND)
        for row in table
        for name in NAMES
    )
    text = [
        f"Medians of {len(rounds)} rounds: live, then the simulator's error (evictions: points),",
        f"and in brackets the errors of all rounds. {within} of {len(table) * len(NAMES)} medians",
        f"are within {BOUND:.0%} (evictions {100 * EVICTION_BOUND:.0f} points). Times in seconds.",
        f"Mean error of the step times on slices that were held out: {held:.1%} (median round).",
        "",
        *_table(table, _with_errors),
        "",
        "The same with one speed for a whole cell, its mean:",
        "",
        *_table(table, lambda row, name: f"{row['steady_error'][name]:+.1%}"),
        "",
        "How far the live engine differs from itself between rounds (largest / smallest - 1):",
        "",
        *_table(table, lambda row, name: f"{row['spread'][name]:.1%}"),
    ]
    return "\n".join(text) + "\n"


def _with_errors(row: dict[str, Any], name: str) -> str:
    marks = ", ".join(f"{e:+.1%}" for e in row["errors"][name])
    live = f"{row['live'][name]:.1%}" if name == "evicted" else f"{row['live'][name]:.4g}"
    return f"{live}, {row['error'][name]:+.1%} ({marks})"


def _table(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any], str], str]) -> list[str]:
    lines = ["| load | preset | " + " | ".join(NAMES) + " |", "| --- " * (len(NAMES) + 2) + "|"]
    for row in rows:
        cells = " | ".join(cell(row, name) for name in NAMES)
        lines.append(f"| {row['load']} | {row['preset']} | {cells} |")
    return lines
