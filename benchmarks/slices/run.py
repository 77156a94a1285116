"""Slices over many instances, simulated: SCLS, its baselines and its ladder.

    python benchmarks/slices/run.py [--workers N] [--quick]

Eight instances of Llama-2-13B on an A100-80GB each (step times of the profile that ships with
Penstock, KV memory for 64,000 tokens), Poisson arrivals for 200 seconds, prompts and outputs of at
most 1,024 tokens, drawn from fits of ShareGPT's and the Azure conversation trace's lengths.  All
requests are served to their end; throughput is requests over the time until the last one ended.

``sls`` and the ``scls`` presets run rectangles: prompts padded to the longest, and every row
computed until the last one ends or the slice does, as with Hugging Face's ``generate``.  ``ils``
batches continuously with at most 16 requests at a time, as the systems that SCLS was compared with
do; ``vllm`` and ``past-future`` are what continuous batching with paged memory is today.  They go
to the instances in turn.  ``paged``: the same slices on an engine that neither pads nor computes
rows that have ended.  ``scls-kv``: continuous batching, and requests may move after a slice.

What to expect, written before it was measured: ``scls`` above ``sls`` by two to four times at
overload, most of it from larger batches; above ``ils`` at 16 by little, since that one wastes
nothing; far below ``vllm``, which neither computes prompts again nor waits; best slices of 64 to
256 tokens; the spread of completion times falls with max-min offloading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import picture
from cells import Cell, measured, priced, seeds

from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.policies.fleets import FLEETS, PLACES
from penstock.sim import profiles
from penstock.sim.slicing import price

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "slices"
LENGTHS = ("sharegpt", "azure-conversation")
RATES = (5, 10, 15, 20, 30, 40, 60)
HEAVY = 40
SEEDS = 2
METRICS = (
    "throughput", "mean_response", "p95_response", "completion_std", "busy_std", "batch_size",
    "slices", "early_return", "invalid_tokens", "pad_tokens", "evictions",
)  # fmt: skip
COLUMNS = (
    ("throughput", "throughput req/s", "{:.2f}"),
    ("mean_response", "mean response s", "{:.1f}"),
    ("p95_response", "p95 s", "{:.1f}"),
    ("completion_std", "std of completion s", "{:.1f}"),
    ("busy_std", "std of busy s", "{:.1f}"),
    ("batch_size", "batch", "{:.1f}"),
    ("slices", "slices", "{:.2f}"),
    ("early_return", "early returns", "{:.0%}"),
    ("invalid_tokens", "invalid tokens", "{:.0f}"),
    ("pad_tokens", "pad tokens", "{:.0f}"),
)


def cells() -> Iterator[Cell]:
    """All of the study."""
    presets = ("sls", "ils", "vllm", "past-future", *FLEETS)
    for lengths in LENGTHS:
        for rate in RATES:
            for preset in presets:
                yield Cell("rates", preset, lengths, rate)
            yield Cell("rates", "scls", lengths, rate, padded=False)
        for size in (8, 31):
            yield Cell("sizes", "sls", lengths, HEAVY, parameters=(("batch_size", size),))
            yield Cell("sizes", "ils", lengths, HEAVY, parameters=(("parallel", size),))
        for tokens in (32, 64, 128, 256, 512):
            yield Cell("slice", "scls", lengths, HEAVY, parameters=(("slice_tokens", tokens),))
    for instances in (1, 2, 4, 8, 16, 32, 64):
        for preset in ("sls", "ils", "scls", "vllm"):
            yield Cell("instances", preset, "sharegpt", 4 * instances, instances)
    for place in PLACES:
        if place != "max-min":
            yield Cell("places", "past-future", "azure-conversation", 24, place=place)


def run(workers: int, *, quick: bool) -> list[dict[str, Any]]:
    """Every cell with every seed; means over the seeds."""
    chosen = [cell for cell in cells() if not quick or (cell.part == "rates" and cell.rate == 20)]
    work = [each for cell in chosen for each in seeds(cell, 1 if quick else SEEDS)]
    began, rows = time.perf_counter(), []
    with ProcessPoolExecutor(workers) as pool:
        for number, row in enumerate(pool.map(measured, work), 1):
            rows.append(row)
            if number % 20 == 0 or number == len(work):
                took = time.perf_counter() - began
                print(f"{number} of {len(work)} cells, {took:.0f} s", flush=True)
    return list(_means(rows))


def _means(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["part"], row["label"], row["lengths"], row["rate"], row["instances"]].append(row)
    for group in groups.values():
        first = {key: value for key, value in group[0].items() if key != "seed"}
        for name in METRICS:
            values = [row[name] for row in group if row[name] is not None]
            first[name] = statistics.mean(values) if values else None
        yield first | {"seeds": len(group)}


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The study as Markdown."""
    for lengths in LENGTHS:
        for rate in RATES:
            part = _pick(rows, "rates", lengths, rate)
            if part:
                yield f"\n## {lengths}, {rate} requests/s, 8 instances\n"
                yield from _table(part)
                yield _ratio(part)
        for name, title in (("sizes", "other batch sizes"), ("slice", "length of the slice")):
            part = _pick(rows, name, lengths, HEAVY)
            if part:
                yield f"\n## {lengths}, {HEAVY} requests/s: {title}\n"
                yield from _table(part)
    part = [row for row in rows if row["part"] == "instances"]
    if part:
        yield "\n## sharegpt, 4 requests/s per instance: number of instances\n"
        yield from _table(part, lambda row: f"{row['label']}, {row['instances']}")
    part = _pick(rows, "places", "azure-conversation", 24)
    if part:
        yield "\n## azure-conversation, 24 requests/s: placement\n"
        yield from _table(part)


def _pick(rows: list[dict[str, Any]], part: str, lengths: str, rate: float) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if row["part"] == part and row["lengths"] == lengths and row["rate"] == rate
    ]


def _table(part: list[dict[str, Any]], name: Any = lambda row: row["label"]) -> Iterator[str]:
    yield "| | " + " | ".join(title for _, title, _ in COLUMNS) + " |"
    yield "| --- |" + " --- |" * len(COLUMNS)
    for row in part:
        values = ("" if row[key] is None else form.format(row[key]) for key, _, form in COLUMNS)
        yield f"| {name(row)} | " + " | ".join(values) + " |"


def _ratio(part: list[dict[str, Any]]) -> str:
    by = {row["label"]: row["throughput"] for row in part}
    ratios = ", ".join(f"{by['scls'] / by[name]:.2f} times {name}" for name in ("sls", "ils"))
    return f"\nThroughput of `scls`: {ratios}; `vllm` has {by['vllm'] / by['scls']:.2f} times its."


def estimates() -> Iterator[str]:
    """Errors of the prices of slices, for each profile."""
    yield "\n## Errors of the estimates\n"
    yield "Mean absolute relative errors, on the grid that they were fitted to and between its"
    yield "points; of prefills, of decode steps, and of whole slices of 128 tokens.\n"
    yield "| profile | prefill, train | decode, train | prefill, test | decode, test | slices |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in profiles.names():
        found = price(profiles.load(name))
        errors = (*found.train, *found.test, found.slices)
        yield f"| {name} | " + " | ".join(f"{error:.1%}" for error in errors) + " |"


def main() -> None:
    """Run the study, and write its tables and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="one rate and one seed, not stored")
    arguments = parser.parse_args()
    began = time.perf_counter()
    rows = run(arguments.workers, quick=arguments.quick)
    text = "\n".join([*tables(rows), *estimates()])
    if arguments.quick:
        print(text)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {
        "command": "python benchmarks/slices/run.py",
        "commit": revision(ROOT),
        "machine": machine(),
        "wall_s": round(time.perf_counter() - began),
        "prices": priced()._asdict() | {"model": repr(priced().model)},
    }
    (RESULTS / "results.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    head = f"# Slices over many instances\n\nCommit {about['commit']}; means of {SEEDS} seeds."
    (RESULTS / "results.md").write_text(f"{head}\n{text}\n")
    picture.draw(rows, RESULTS / "slices.png")


if __name__ == "__main__":
    main()
