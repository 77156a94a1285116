"""Kairos's study, simulated: its sweep, its sensitivity, and what the paper leaves out.

    python benchmarks/kairos/run.py [--mooncake FILE]

One prefill and one decode instance with the step times of the paper's testbed; see ``cells.py`` for
loads and machines.  ``--mooncake`` is the conversation trace of kvcache-ai/Mooncake's FAST'25
release; without it the study is of the synthetic load only.

Expected, written before it was measured: ``kairos`` ahead of ``distserve`` at every load, in TTFT
and end to end, by more than the paper's +23.9 and +33.8 points near saturation, since giving up a
few long prompts frees most of the machine; TPOT by about the paper's +27.1 where decode is the
bottleneck, and nothing where it is not; the printed rules ahead of ``distserve`` in TTFT and behind
it in TPOT, because one late request ends their packing; more decode speed at low load, none at
overload.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from cells import Cell, measure
from report import write

from penstock.bench.local import revision
from penstock.bench.result import machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kairos"
PRESETS = ("distserve", "kairos-literal", "kairos")
QPS = (2.0, 2.4, 2.8, 3.0, 3.4, 4.0, 5.0)
MOONCAKE_QPS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0, 2.4)
ORDERS = ("shortest-prefill", "earliest-deadline", "least-laxity", "aged-shortest")
NEAR = 3.0  # requests per second near saturation
SEEDS = 2  # of the sweep; the rest is of one


def sweep(mooncake: str | None) -> Iterator[tuple[str, Cell]]:
    """The paper's: attainment over load."""
    for qps in QPS:
        for preset in PRESETS:
            yield f"synthetic/{qps:g}/{preset}", Cell("synthetic", qps, preset)
    for qps in MOONCAKE_QPS if mooncake else ():
        for preset in PRESETS:
            yield f"mooncake/{qps:g}/{preset}", Cell(str(mooncake), qps, preset)


def sensitivity() -> Iterator[tuple[str, Cell]]:
    """One thing changed at a time."""
    changes: dict[str, tuple[float, ...]] = {
        "chunk": (2048, 8192, 32_768),
        "tail": (0.0, 0.01, 0.02, 0.04),
        "slo_scale": (0.5, 1.0, 2.0),
        "noise": (0.0, 0.2, 0.5),
        "kv_tokens": (250_000, 500_000, 1_000_000, 2_000_000),
    }
    for preset in ("distserve", "kairos"):
        base = Cell("synthetic", NEAR, preset)
        for name, values in changes.items():
            for value in values:
                kind = type(getattr(base, name))
                yield f"{name}/{value:g}/{preset}", replace(base, **{name: kind(value)})


def ablation() -> Iterator[tuple[str, Cell]]:
    """Each side alone, other orders, and a prompt's time with and without attention's square."""
    for qps in (NEAR, 4.0):
        base = Cell("synthetic", qps, "distserve")
        yield f"ablation/{qps:g}/neither", base
        yield f"ablation/{qps:g}/prefill side only", replace(base, order="urgency")
        kairos = replace(base, preset="kairos")
        yield f"ablation/{qps:g}/decode side only", replace(kairos, order="fcfs")
        yield f"ablation/{qps:g}/both", kairos
        for order in ORDERS:
            yield f"ablation/{qps:g}/{order}", replace(base, order=order)
        for preset, aware in (("kairos", 0), ("kairos-literal", 1)):
            yield (
                f"ablation/{qps:g}/{preset} length_aware={aware}",
                replace(base, preset=preset, parameters={"length_aware": aware}),
            )
        for factor in (0.8, 1.0):
            yield (
                f"ablation/{qps:g}/both, back-pressure {factor:g}",
                replace(kairos, back_pressure=factor),
            )


def others() -> Iterator[tuple[str, Cell]]:
    """A straggler, and more instances."""
    for preset in PRESETS:
        base = Cell("synthetic", 2.4, preset)
        yield f"straggler/without/{preset}", base
        yield f"straggler/with/{preset}", replace(base, straggler=True)
    for preset in ("distserve", "kairos"):
        for prefill, decode in ((1, 3), (2, 2), (3, 1), (2, 6), (4, 4), (6, 2), (8, 8), (11, 5)):
            count = prefill + decode
            cell = Cell("synthetic", 1.5 * count, preset, prefill=prefill, decode=decode)
            yield (
                f"ratio/{prefill}:{decode}/{preset}",
                replace(cell, requests=250 * count),
            )


def links() -> Iterator[tuple[str, Cell]]:
    """Slower links between the two, with KV at the end of a prefill, and chunk by chunk."""
    for preset in ("distserve", "kairos"):
        for bandwidth in (450.0, 25.0, 5.0, 2.0):
            for stream in (False, True):
                how = "chunk by chunk" if stream else "at the end"
                yield (
                    f"link/{bandwidth:g} GB per s, {how}/{preset}",
                    Cell("synthetic", 2.8, preset, bandwidth=bandwidth, stream=stream),
                )


def averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, of numbers and of tables of numbers."""
    found: dict[str, Any] = {"cell": rows[0]["cell"]}
    for key, value in rows[0].items():
        if isinstance(value, dict) and key != "cell":
            tables = [row[key] for row in rows]
            found[key] = {
                name: mean(table[name] for table in tables if name in table) for name in value
            }
        elif isinstance(value, float | int):
            found[key] = mean(row[key] for row in rows)
    return found


def main() -> None:
    """Measure every cell under several seeds, and write down what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mooncake", type=Path)
    arguments = parser.parse_args()
    trace = None if arguments.mooncake is None else str(arguments.mooncake)
    began = time.perf_counter()
    cells = [*sweep(trace), *sensitivity(), *ablation(), *others(), *links()]
    seeded = [
        (name, replace(cell, seed=seed))
        for name, cell in cells
        for seed in range(SEEDS if name.startswith(("synthetic/", "mooncake/")) else 1)
    ]
    rows = defaultdict[str, list[dict[str, Any]]](list)
    with ProcessPoolExecutor() as pool:
        measured = pool.map(measure, [cell for _, cell in seeded])
        for (name, _), row in zip(seeded, measured, strict=True):
            if trace is not None and row["cell"]["load"] == trace:
                row["cell"]["load"] = Path(trace).name
            rows[name].append(row)
            print(name, round(row["e2e"], 1), flush=True)
    found = {name: averaged(each) for name, each in rows.items()}
    about = {
        "command": "python benchmarks/kairos/run.py"
        + (f" --mooncake {Path(trace).name}" if trace else ""),
        "commit": revision(ROOT),
        "machine": machine(),
        "took_s": time.perf_counter() - began,
        "seeds": SEEDS,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "cells": found}, indent=1)
    (RESULTS / "results.json").write_text(text + "\n", encoding="utf-8")
    write(RESULTS, about, found)


if __name__ == "__main__":
    main()
