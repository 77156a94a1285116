"""From measured rounds to a table."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import msgspec

METRICS = ("goodput", "throughput", "ttft_p50", "ttft_p99", "gap_p99")
BOUND, EVICTION_BOUND = 0.05, 0.02


def error(row: dict[str, Any], name: str) -> float:
    """Signed: relative, or in points for evictions."""
    seen, said = row["live"][name], row["sim"][name]
    if name == "evicted":
        return float(said - seen)
    return float(said / seen - 1) if seen else float("nan")


def line(row: dict[str, Any]) -> str:
    """A cell as it is measured."""
    parts = [f"{name} {row['live'][name]:.4g} ({error(row, name):+.1%})" for name in METRICS]
    parts.append(f"evicted {row['live']['evicted']:.1%} ({error(row, 'evicted'):+.1%})")
    return (
        f"{row['load']}, {row['preset']}: " + ", ".join(parts)
        + f"; steps {row['steps']}, step error {row['step_error']:.1%},"
        f" sum {row['time_error']:+.1%}"
    )  # fmt: skip


def write(path: Path, out: Path) -> None:
    """Write results.json and results.md from the rounds."""
    rounds: list[dict[str, Any]] = [
        msgspec.json.decode(text) for text in path.read_bytes().splitlines()
    ]
    first = rounds[0]
    table = [_row([one["cells"][i] for one in rounds]) for i in range(len(first["cells"]))]
    data = {
        "rounds": len(rounds),
        **{
            key: first[key]
            for key in ("command", "commit", "model", "threads", "cpu")
            if key in first
        },
        "profiles": [one["profile"] for one in rounds],
        "errors_held_out": [one["error_held_out"] for one in rounds],
        "cells": table,
    }
    (out / "results.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n"
    )
    (out / "results.md").write_text(_markdown(rounds, table), encoding="utf-8")


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell over all rounds: medians of what was seen and said, and of the errors."""
    names = (*METRICS, "evicted")
    return {
        "load": rows[0]["load"],
        "preset": rows[0]["preset"],
        "live": {name: median(row["live"][name] for row in rows) for name in names},
        "sim": {name: median(row["sim"][name] for row in rows) for name in names},
        "error": {name: median(error(row, name) for row in rows) for name in names},
        "errors": {name: [error(row, name) for row in rows] for name in names},
        "spread": {name: _spread([row["live"][name] for row in rows]) for name in names},
        "step_error": median(row["step_error"] for row in rows),
        "time_error": median(row["time_error"] for row in rows),
    }


def _spread(values: list[float]) -> float:
    """Largest over smallest, less one: what the machine itself does between rounds."""
    return max(values) / min(values) - 1 if min(values) > 0 else max(values) - min(values)


def _markdown(rounds: list[dict[str, Any]], table: list[dict[str, Any]]) -> str:
    names = (*METRICS, "evicted")
    text = [
        f"Medians of {len(rounds)} rounds: live, then the simulator's error (evictions: points),",
        "and in brackets the errors of all rounds. Times in seconds.",
        "",
        "| load | preset | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for row in table:
        cells = []
        for name in names:
            marks = ", ".join(f"{e:+.1%}" for e in row["errors"][name])
            live = f"{row['live'][name]:.1%}" if name == "evicted" else f"{row['live'][name]:.4g}"
            cells.append(f"{live}, {row['error'][name]:+.1%} ({marks})")
        text.append(f"| {row['load']} | {row['preset']} | " + " | ".join(cells) + " |")
    text += [
        "",
        "How far the same live measurement differs between rounds (largest / smallest - 1):",
        "",
        "| load | preset | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    text += [
        f"| {row['load']} | {row['preset']} | "
        + " | ".join(f"{row['spread'][name]:.1%}" for name in names) + " |"
        for row in table
    ]  # fmt: skip
    return "\n".join(text) + "\n"
