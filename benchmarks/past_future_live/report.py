"""From finished cells to a table (Markdown), a figure (PNG) and the numbers (JSON)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from cells import LOADS, PRESETS, Book
from matplotlib.figure import Figure

from penstock.bench.compare import COLORS
from penstock.core.types import SLO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Value = Callable[[Row], float | None]


def _share_of_completed(row: Row, bound: str) -> float | None:
    done = row["summary"]["ends"].get("completed", 0)
    broken = sum(c["broken"].get(bound, 0) for c in row["summary"]["classes"].values())
    return broken / done if done else None


def _per_request(row: Row) -> float | None:
    done = row["summary"]["ends"].get("completed", 0)
    return None if row["evictions"] is None or not done else row["evictions"] / done


def _latency(row: Row, name: str) -> float | None:
    table = row["summary"]["percentiles"].get(name)
    return None if table is None else 1000 * table["p99"]


COLUMNS: Mapping[str, tuple[Value, str]] = {
    "goodput tok/s": (lambda r: r["summary"]["goodput_output_tps"], "{:.0f}"),
    "with prompts": (lambda r: r["summary"]["goodput_total_tps"], "{:.0f}"),
    "throughput tok/s": (lambda r: r["summary"]["throughput_output_tps"], "{:.0f}"),
    "late gap": (lambda r: _share_of_completed(r, "gap"), "{:.0%}"),
    "evictions / request": (_per_request, "{:.2f}"),
    "KV used": (lambda r: r["kv_use"], "{:.0%}"),
    "running": (lambda r: r["running"], "{:.0f}"),
    "p99 TTFT ms": (lambda r: _latency(r, "ttft"), "{:.0f}"),
    "p99 gap ms": (lambda r: _latency(r, "gap"), "{:.0f}"),
}


def write(book: Book, slo: SLO, facts: Mapping[str, object], out: Path) -> None:
    """Write ``results.json``, ``results.md`` and ``goodput.png``."""
    rows = list(book.rows.values())
    if not rows:
        return
    groups = _grouped(rows)
    medians = [
        {"load": key[0], "clients": key[1], "preset": key[2], "repeats": len(group)}
        | {name: _median(group, value) for name, (value, _) in COLUMNS.items()}
        for key, group in groups.items()
    ]
    data = {"facts": facts, "slo": {"ttft": slo.ttft, "gap": slo.gap}, "medians": medians}
    text = msgspec.json.format(msgspec.json.encode(data), indent=1)
    (out / "results.json").write_bytes(text + b"\n")
    (out / "results.md").write_text(_markdown(groups, slo, facts), encoding="utf-8")
    _figure(groups).savefig(out / "goodput.png", dpi=130)


def _grouped(rows: list[dict[str, object]]) -> dict[tuple[str, int, str], list[Row]]:
    groups: dict[tuple[str, int, str], list[Row]] = {}
    names = [load.name for load in LOADS]
    for row in sorted(rows, key=lambda r: _order(r, names)):
        groups.setdefault((row["load"], row["clients"], row["preset"]), []).append(row)
    return groups


def _order(row: Row, names: list[str]) -> tuple[int, int, int]:
    presets = list(PRESETS)
    place = presets.index(row["preset"]) if row["preset"] in presets else len(presets)
    return names.index(row["load"]), -row["clients"], place


def _markdown(
    groups: dict[tuple[str, int, str], list[Row]], slo: SLO, facts: Mapping[str, object]
) -> str:
    lines = [
        "# Past-Future, live: results",
        "",
        (
            "Medians over the repeats; method, scaling and expectation are in "
            "`benchmarks/past_future_live/README.md`."
        ),
        "",
        f"SLO: TTFT {slo.ttft:.3f} s, gap {slo.gap:.3f} s.",
        "",
    ]
    lines += [f"- {name}: `{value}`" for name, value in facts.items()]
    for load, clients in dict.fromkeys(key[:2] for key in groups):
        lines += ["", f"## {load}, {clients} clients", ""]
        lines += ["| scheduler | n | " + " | ".join(COLUMNS) + " |"]
        lines += ["|---|---|" + "---|" * len(COLUMNS)]
        for (name, count, preset), group in groups.items():
            if (name, count) == (load, clients):
                cells = [_cell(group, *column) for column in COLUMNS.values()]
                lines.append(f"| {preset} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(group: list[Row], value: Value, form: str) -> str:
    median = _median(group, value)
    return "-" if median is None else form.format(median)


def _figure(groups: dict[tuple[str, int, str], list[Row]]) -> Figure:
    loads = list(dict.fromkeys(key[0] for key in groups))
    figure = Figure(figsize=(4.2 * len(loads), 4), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(1, len(loads), squeeze=False)[0])
    for axes, load in zip(all_axes, loads, strict=True):
        for preset in dict.fromkeys(key[2] for key in groups):
            points = sorted(
                (key[1], [r["summary"]["goodput_output_tps"] for r in group])
                for key, group in groups.items()
                if (key[0], key[2]) == (load, preset)
            )
            if not points:
                continue
            x = [clients for clients, _ in points]
            middle = [statistics.median(values) for _, values in points]
            color = COLORS.get(preset, "#b58db6")
            style = ":" if preset == "oracle" else "-"
            axes.plot(x, middle, style, marker="o", ms=4, color=color, label=preset)
            low, high = [min(v) for _, v in points], [max(v) for _, v in points]
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axes.set(title=load, xlabel="clients", ylim=(0, None))
    all_axes[0].set_ylabel("goodput, output tok/s")
    all_axes[0].legend(frameon=False, fontsize="small")
    return figure


def _median(group: list[Row], value: Value) -> float | None:
    values = [v for row in group if (v := value(row)) is not None]
    return statistics.median(values) if values else None
