"""The Markdown page of an engine speed run."""

from __future__ import annotations

import statistics
from typing import Any


def markdown(outcome: dict[str, Any]) -> str:
    """A table of medians, and what is needed to read it."""
    sides = list(outcome["versions"])
    machine = outcome["machine"]
    where = (
        f"- {machine.get('Model name', 'unknown CPU')}, {machine['threads']} threads, "
        f"L3 {machine.get('L3 cache', 'unknown')}, Linux {machine['kernel']}, "
        f"Python {machine['python']}; "
        f"15-minute load average at the end {outcome['load_average_at_end']:.2f}"
    )
    lines = [
        f"# Engine speed, {outcome['dtype']}",
        "",
        "Output tokens per second, prefill included: median (lowest to highest) of the trials.",
        "Ratios are the native engine's median over the other's.",
        "",
        f"- Started {outcome['started']}, commit {outcome['commit'] or 'not committed'}",
        where,
    ]
    for side, versions in outcome["versions"].items():
        lines.append(f"- {side}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    others = [side for side in sides if side != "penstock"]
    header = ["model", "requests", *sides, *(f"vs {side}" for side in others)]
    lines += ["", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for model, concurrency in dict.fromkeys(
        (trial["model"], trial["concurrency"]) for trial in outcome["trials"]
    ):
        rates = {side: _rates(outcome, model, concurrency, side) for side in sides}
        medians = {side: statistics.median(values) for side, values in rates.items()}
        row = [model, str(concurrency)]
        row += [
            f"{medians[side]:.0f} ({min(rates[side]):.0f} to {max(rates[side]):.0f})"
            for side in sides
        ]
        row += [f"{medians['penstock'] / medians[side]:.2f}x" for side in others]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _rates(outcome: dict[str, Any], model: str, concurrency: int, side: str) -> list[float]:
    return [
        trial["tokens_per_second"]
        for trial in outcome["trials"]
        if (trial["model"], trial["concurrency"], trial["side"]) == (model, concurrency, side)
    ]
