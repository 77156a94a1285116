"""The study's tables and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

PRESETS = ("distserve", "kairos-literal", "kairos")
# Kairos and DistServe, as far as the paper's text has numbers (arXiv 2605.02329, evaluation).
PAPER = {
    "ttft": {2.8: (100.0, 100.0), 3.0: (100.0, 76.1), 3.4: (76.9, 60.5), 5.0: (16.1, 15.5)},
    "tpot": {2.0: (96.6, 73.7), 3.0: (89.6, 62.5)},
    "e2e": {3.0: (89.6, 55.8), 4.0: (47.2, 29.0)},
    "speed": {2.0: (28.1, 23.6), 5.0: (22.6, 20.9)},
}
NAMES = {
    "ttft": "TTFT, %",
    "tpot": "TPOT, %",
    "e2e": "end to end, %",
    "speed": "median decode speed, tokens/s",
}
Cells = dict[str, dict[str, Any]]


def write(folder: Path, about: dict[str, Any], cells: Cells) -> None:
    """Write ``results.md`` and ``kairos.png``."""
    how = (
        f"`{about['command']}`, commit {about['commit']}, {about['took_s']:.0f} s, means of "
        f"{about['seeds']} seeds for the sweeps, one for the rest."
    )
    parts = [
        "# Kairos's study, simulated",
        how,
        *(_sweep(cells, load) for load in ("synthetic", "mooncake")),
        _gains(cells),
        _section(cells, "Attainment by length, end to end, %", "synthetic/3/", _buckets),
        *(
            _section(cells, f"Sensitivity: {name}", f"{name}/", _row)
            for name in ("chunk", "tail", "slo_scale", "noise", "kv_tokens")
        ),
        _section(cells, "Ablation", "ablation/", _row),
        _section(cells, "One hopeless straggler", "straggler/", _row),
        _section(cells, "Links, 2.8 requests/s", "link/", _row),
        _section(cells, "Prefill : decode instances, 1.5 requests/s each", "ratio/", _row),
    ]
    text = "\n\n".join(part for part in parts if part)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    _picture(folder / "kairos.png", cells)


def _loads(cells: Cells, load: str) -> list[float]:
    names = [name.split("/") for name in cells if name.startswith(f"{load}/")]
    return sorted({float(qps) for _, qps, _ in names})


def _sweep(cells: Cells, load: str) -> str:
    """Numbers over load; the paper's beside the synthetic ones."""
    loads = _loads(cells, load)
    if not loads:
        return ""
    lines = [f"## {load.capitalize()} load"]
    for key, title in NAMES.items():
        beside = PAPER[key] if load == "synthetic" else {}
        heads = ["requests/s", *PRESETS, *(["paper: DistServe", "paper: Kairos"] if beside else [])]
        lines += ["", f"**{title}**", "", _line(heads), _line(["---"] * len(heads))]
        for qps in loads:
            ours = [f"{cells[f'{load}/{qps:g}/{preset}'][key]:.1f}" for preset in PRESETS]
            said = beside.get(qps)
            theirs = [f"{said[1]:.1f}", f"{said[0]:.1f}"] if said else ["", ""]
            lines.append(_line([f"{qps:g}", *ours, *(theirs if beside else [])]))
    return "\n".join(lines)


def _gains(cells: Cells) -> str:
    """The largest and the smallest difference to distserve, per number and load."""
    lines = [
        "## kairos over distserve",
        "",
        _line(
            ["load", "number", "largest gain", "at", "smallest gain", "at", "the paper's largest"]
        ),
        _line(["---"] * 7),
    ]
    paper = {"ttft": "+23.9", "tpot": "+27.1", "e2e": "+33.8", "speed": "+19.3 %"}
    for load in ("synthetic", "mooncake"):
        loads = _loads(cells, load)
        for key in NAMES if loads else ():
            gains = []
            for qps in loads:
                new = cells[f"{load}/{qps:g}/kairos"][key]
                old = cells[f"{load}/{qps:g}/distserve"][key]
                gains.append((100 * (new / old - 1) if key == "speed" else new - old, qps))
            (most, where), (least, there) = max(gains), min(gains)
            unit = " %" if key == "speed" else ""
            lines.append(
                _line(
                    [
                        load, NAMES[key], f"{most:+.1f}{unit}", f"{where:g}", f"{least:+.1f}{unit}",
                        f"{there:g}", paper[key],
                    ]
                )
            )  # fmt: skip
    return "\n".join(lines)


def _section(cells: Cells, title: str, prefix: str, row: Any) -> str:
    names = [name for name in cells if name.startswith(prefix)]
    if not names:
        return ""
    rows = [(name.removeprefix(prefix), row(cells[name])) for name in names]
    heads = ["", *rows[0][1]]
    lines = [f"## {title}", "", _line(heads), _line(["---"] * len(heads))]
    lines += [_line([name, *values.values()]) for name, values in rows]
    return "\n".join(lines)


def _row(cell: dict[str, Any]) -> dict[str, str]:
    return {
        "TTFT %": f"{cell['ttft']:.1f}",
        "TPOT %": f"{cell['tpot']:.1f}",
        "end to end %": f"{cell['e2e']:.1f}",
        "tokens/s": f"{cell['speed']:.1f}",
        "gap p99 s": f"{cell['gap_p99_s']:.2f}",
        "longest wait s": f"{cell['longest_wait_s']:.0f}",
        "evictions": f"{cell['evictions']:.0f}",
        "planning p50 / p99 us": f"{cell['planning_p50_us']:.0f} / {cell['planning_p99_us']:.0f}",
    }


def _buckets(cell: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in cell["buckets"].items()}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _picture(path: Path, cells: Cells) -> None:
    loads = [load for load in ("synthetic", "mooncake") if _loads(cells, load)]
    figure, axes = plt.subplots(
        len(loads), 4, figsize=(16, 3.6 * len(loads)), squeeze=False, layout="constrained"
    )
    for row, load in enumerate(loads):
        for column, (key, title) in enumerate(NAMES.items()):
            view = axes[row][column]
            for preset in PRESETS:
                at = _loads(cells, load)
                view.plot(
                    at, [cells[f"{load}/{q:g}/{preset}"][key] for q in at], marker="o", label=preset
                )
            if load == "synthetic":
                for index, name in enumerate(("paper: Kairos", "paper: DistServe")):
                    points = PAPER[key]
                    view.scatter(
                        list(points), [pair[index] for pair in points.values()],
                        marker="x" if index else "+", color="black", label=name,
                    )  # fmt: skip
            view.set(title=f"{load}: {title}", xlabel="requests/s", ylim=(0, None))
            view.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
