"""What one measurement brought, as data, and as a table for a terminal."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from penstock.bench.goodput import BOUNDS, Attempt, Summary
from penstock.bench.workload import SLOClass

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
LABELS = {
    "hidden": "true output lengths known to the engine only",
    "leaked": "lengths leaked: every request told the server its true output length",
    "model": "output lengths chosen by the model",
}


@dataclass(frozen=True, slots=True)
class ServerNumbers:
    """The server's own numbers over the window; None where it does not publish them."""

    evictions: int | None = None
    kv_use_mean: float | None = None
    running_mean: float | None = None
    kv_series: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A measurement.

    Attributes:
        lengths: a key of ``LABELS``.
        settings: what was asked for, for the record.
        window: seconds from the first request to the window's start and end.
        attempts: every attempt, in the order in which they ended.
        start: when the first request left, on the clock of ``attempts``.
        client_cpu: CPU seconds of the client per second of the run.
        send_lag_p99: open loop: by how much requests left late.
        gave_up: requests whose retries were used up.
    """

    source: str
    lengths: str
    classes: tuple[SLOClass, ...]
    settings: Mapping[str, object]
    notes: tuple[str, ...]
    window: tuple[float, float]
    summary: Summary
    server: ServerNumbers
    attempts: Sequence[Attempt] = field(repr=False)
    start: float
    client_cpu: float
    send_lag_p99: float | None = None
    gave_up: int = 0

    def to_dict(self) -> dict[str, object]:
        """As plain data, for JSON; attempts as columns, times from the start."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "lengths": self.lengths,
            "lengths_label": LABELS[self.lengths],
            "classes": [asdict(c) for c in self.classes],
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "window_s": list(self.window),
            "summary": self.summary.to_dict(),
            "server": asdict(self.server),
            "client_cpu": self.client_cpu,
            "send_lag_p99_s": self.send_lag_p99,
            "gave_up": self.gave_up,
            "machine": machine(),
            "attempts": self._columns(),
        }

    def _columns(self) -> dict[str, list[object]]:
        rows = self.attempts
        columns: dict[str, list[object]] = {
            "request": [a.request for a in rows],
            "try": [a.number for a in rows],
            "slo_class": [a.slo_class for a in rows],
            "prompt_tokens": [a.prompt_tokens for a in rows],
            "output_tokens": [a.output_tokens for a in rows],
            "sent_s": [round(a.sent - self.start, 6) for a in rows],
            "ended_s": [round(a.ended - self.start, 6) for a in rows],
            "end": [a.end.value for a in rows],
            "broken": [list(a.broken) for a in rows],
        }
        for name in BOUNDS:
            columns[f"{name}_s"] = [getattr(a.latency, name) for a in rows]
        return columns


def command_line() -> str:
    """How this process was called, to be typed again elsewhere."""
    return shlex.join(["penstock", *sys.argv[1:]])


def machine() -> dict[str, object]:
    """Where this ran."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }


def table(result: Result) -> Table:
    """The numbers that matter, for a terminal."""
    from rich.table import Table

    summary, server = result.summary, result.server
    view = Table(title=result.source, title_justify="left", show_header=False)
    view.add_column(style="bold")
    view.add_column(justify="right")
    for name, value in _lines(result):
        view.add_row(name, value)
    view.add_section()
    for name, row in summary.percentiles.items():
        view.add_row(
            f"{name} p50 / p90 / p99",
            " / ".join(seconds(row[p]) for p in ("p50", "p90", "p99")),
        )
    if len(summary.classes) > 1:
        view.add_section()
        for name, part in summary.classes.items():
            view.add_row(
                f"class {name}",
                f"{share(part.attainment)} met, {part.goodput_output_tps:.1f} tok/s",
            )
    if server.kv_use_mean is not None or server.evictions is not None:
        view.add_section()
        view.add_row("evictions", "-" if server.evictions is None else str(server.evictions))
        view.add_row("KV memory used (mean)", share(server.kv_use_mean))
    return view


def _lines(result: Result) -> list[tuple[str, str]]:
    summary = result.summary
    broken = {
        name: sum(part.broken.get(name, 0) for part in summary.classes.values()) for name in BOUNDS
    }
    lines = [
        ("goodput (output)", f"{summary.goodput_output_tps:.1f} tok/s"),
        ("goodput (prompt + output)", f"{summary.goodput_total_tps:.1f} tok/s"),
        ("goodput (requests)", f"{summary.goodput_rps:.3f} req/s"),
        ("attainment", share(summary.attainment)),
        ("throughput (output)", f"{summary.throughput_output_tps:.1f} tok/s"),
        ("measured", f"{summary.seconds:.1f} s, {summary.attempts} attempts"),
        ("ended", ", ".join(f"{count} {end}" for end, count in summary.ends.items()) or "-"),
        ("broken bounds", ", ".join(f"{n} {name}" for name, n in broken.items() if n) or "none"),
        ("retries", f"{summary.retries}; {result.gave_up} requests given up"),
        ("client CPU", f"{result.client_cpu:.2f} cores"),
        ("lengths", LABELS[result.lengths]),
    ]
    if result.send_lag_p99 is not None:
        lines.append(("requests left late by (p99)", seconds(result.send_lag_p99)))
    return lines


def seconds(value: float | None) -> str:
    """A duration, in ms below one second."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def share(value: float | None) -> str:
    """A share, in percent."""
    return "-" if value is None else f"{value:.1%}"


def percentile(values: Sequence[float], p: float) -> float | None:
    """A percentile; None of nothing."""
    return float(np.percentile(values, p)) if len(values) else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
