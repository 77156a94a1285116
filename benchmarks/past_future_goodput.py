"""Goodput against load, simulated: the 12 panels of the Past-Future paper's figure 7.

    python benchmarks/past_future_goodput.py

Llama-2-7B and 13B on an A100-80GB and 70B on four of them, KV memory for 120,000, 64,000 and
550,000 tokens; ShareGPT-o1 and three uniform distributions; a closed loop of clients with one
request each; a request is good if its TTFT is within 10 s and its largest gap within 1.5 s (70B:
15 s and 5 s).  What was not good goes back to the end of the list until it is, so wasted work
costs time; goodput is prompt and output tokens of good requests per second until all are done.
True output lengths are known to the engine and to the oracle alone; policies are told a cap:
12,000 for ShareGPT-o1, else the longest output, which is the mildest choice for ``tgi``.

What differs from the paper: step times are those of the profiles that ship with Penstock; prompts
are computed in chunks of at most 2,048 tokens a step, mixed with decoding; ShareGPT-o1 is drawn
from a fit of its quantiles.  As in the artifact's servers, a request without a first token after 8
s (70B: 10 s) is given up.  One whose gap is too large already goes on to its end under every
scheduler; the artifact ends it, except under its aggressive one.  ``past-future`` has the paper's
parameters and 1,000 ended requests behind it, as a server in use has.

Beside the paper's four curves there are, for what they show:

* ``past-future, cold``: with nothing behind it;
* ``past-future-artifact``: window 40, reserve 5 %, one admission every second step, cold as well;
* ``tgi, cap 12,000``: as the artifact has it on every load;
* ``past-future, late given up`` and ``vllm, late given up``: an evicted request is given up after
  1.49 s (70B: 4.9 s) without a token.

Cells are kept in ``cells.jsonl`` as they end, and an interrupted run goes on; ``--fresh`` starts
over, ``--main`` leaves the additional curves for later.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from penstock.bench.compare import COLORS
from penstock.bench.fitted import fitted
from penstock.bench.goodput import Attempt, End, misses, summarize
from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.bench.workload import Lengths, Workload, synthetic
from penstock.core.policies import presets
from penstock.core.types import SLO, Capabilities, Ended, FinishReason, OnMiss
from penstock.sim import profiles
from penstock.sim.outcome import attempt_of
from penstock.sim.run import Job, Record, Run, run
from penstock.sim.sources import ClosedLoop

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
PAST = 1000
HORIZON = 12 * 3600.0  # simulated seconds after which no request is sent any more
PREFILL = 2048
ENDLESS = 10**9


@dataclass(frozen=True)
class Machine:
    """A model on its GPUs, with the bounds and the loads that it gets."""

    name: str
    profile: str
    kv_tokens: int
    clients: tuple[int, ...]
    sla: SLO
    given_up: SLO


@dataclass(frozen=True)
class Load:
    """Lengths, and the cap that policies are told."""

    name: str
    lengths: tuple[str, str] | None
    requests: int
    cap: int

    def draw(self, count: int, seed: int) -> Workload:
        """So many requests."""
        if self.lengths is None:
            return fitted("sharegpt-o1", count, seed)
        prompt, output = map(Lengths.parse, self.lengths)
        return synthetic(prompt, output, count, seed)


@dataclass(frozen=True)
class Series:
    """A curve: a preset and what else decides."""

    name: str
    preset: str
    past: int = 0
    cap: int | None = None
    late_given_up: bool = False


SMALL = (10, 20, 30, 40, 60, 80, 100)
SLA, GIVEN_UP = SLO(ttft=10, gap=1.5), SLO(ttft=8, gap=1.49)
MACHINES = (
    Machine("Llama-2-7B", "llama-2-7b/a100-80g", 120_000, SMALL, SLA, GIVEN_UP),
    Machine("Llama-2-13B", "llama-2-13b/a100-80g", 64_000, SMALL, SLA, GIVEN_UP),
    Machine(
        "Llama-2-70B", "llama-2-70b/a100-80g-x4", 550_000, (100, 200, 300, 400, 500),
        SLO(ttft=15, gap=5), SLO(ttft=10, gap=4.9),
    ),
)  # fmt: skip
LOADS = (
    Load("ShareGPT-o1", None, 1900, 12_000),
    Load("Distribution-1", ("uniform:32-4096", "uniform:2048-4096"), 500, 4096),
    Load("Distribution-2", ("uniform:3000-5000", "uniform:3000-5000"), 500, 5000),
    Load("Distribution-3", ("uniform:2048-4096", "uniform:32-4096"), 500, 4096),
)
SERIES = (
    Series("tgi", "tgi"),
    Series("vllm", "vllm"),
    Series("past-future", "past-future", past=PAST),
    Series("oracle", "oracle"),
    Series("past-future, cold", "past-future"),
    Series("past-future-artifact", "past-future-artifact"),
    Series("tgi, cap 12,000", "tgi", cap=12_000),
    Series("past-future, late given up", "past-future", past=PAST, late_given_up=True),
    Series("vllm, late given up", "vllm", late_given_up=True),
)
MAIN = tuple(series.name for series in SERIES[:4])


@dataclass(frozen=True)
class Cell:
    """One simulated run, by the names of what it is made of."""

    machine: str
    load: str
    clients: int
    series: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "/".join(map(str, asdict(self).values()))


def cells(seeds: Sequence[int], *, main: bool = False) -> Iterator[Cell]:
    """All of them, those of the paper's curves first; with ``main`` only those."""
    for group in (SERIES[: len(MAIN)], () if main else SERIES[len(MAIN) :]):
        for seed in seeds:
            for gpu in MACHINES:
                for load in LOADS:
                    for clients in gpu.clients:
                        for series in group:
                            yield Cell(gpu.name, load.name, clients, series.name, seed)


def simulate(cell: Cell) -> dict[str, Any]:
    """Run a cell; the numbers that are kept."""
    began = time.perf_counter()
    gpu, load, series = _find(MACHINES, cell.machine), _find(LOADS, cell.load), _series(cell.series)
    workload = load.draw(load.requests, cell.seed)
    policy = presets.build(series.preset, seed=cell.seed)
    for length in _past(load, series, cell.seed):
        policy.admit.observe(Ended("earlier", FinishReason.STOP, length, 0))
    capabilities = Capabilities(
        kv_blocks=gpu.kv_tokens,
        block_size=1,
        max_batch=1000,
        max_step_tokens=PREFILL,
        max_request_tokens=gpu.kv_tokens,
    )
    source = ClosedLoop(
        _jobs(workload, series.cap or load.cap, _promise(gpu, series)),
        cell.clients,
        retries=ENDLESS,
        met=lambda record: _judged(record, gpu.sla).met,
        until=HORIZON,
    )
    done = run(source, capabilities, policy, profiles.load(gpu.profile))
    numbers = _numbers(done, gpu, load)
    return {"key": cell.key, **asdict(cell), **numbers, "wall_s": time.perf_counter() - began}


def _past(load: Load, series: Series, seed: int) -> list[int]:
    """Output lengths of requests that ended before; others than those that are measured."""
    if not series.past:
        return []
    output = load.draw(series.past, seed + 1_000_000).output
    assert output is not None
    return [int(length) for length in output]


def _promise(gpu: Machine, series: Series) -> SLO:
    return gpu.given_up if series.late_given_up else replace(gpu.given_up, gap=None)


def _jobs(workload: Workload, cap: int, promise: SLO) -> list[Job]:
    assert workload.output is not None
    rows = zip(workload.prompt.tolist(), workload.output.tolist(), strict=True)
    return [
        Job(str(i), 0.0, prompt, output, cap, promise, on_miss=OnMiss.EXPIRE, request=i)
        for i, (prompt, output) in enumerate(rows)
    ]


def _judged(record: Record, sla: SLO) -> Attempt:
    """An attempt by the client's bounds, which are wider than those it is given up at."""
    attempt = attempt_of(record)
    broken = misses(record.latency, sla) if attempt.end is End.COMPLETED else ()
    return replace(attempt, broken=broken)


def _numbers(done: Run, gpu: Machine, load: Load) -> dict[str, Any]:
    attempts = [_judged(record, gpu.sla) for record in done.records]
    summary = summarize(attempts, 0.0, done.seconds)
    late = summary.percentiles
    return {
        "goodput": summary.goodput_total_tps,
        "goodput_output": summary.goodput_output_tps,
        "good": summary.requests_met,
        "requests": load.requests,
        "attempts": summary.attempts,
        "given_up": summary.ends.get("expired", 0),
        "late_ttft": sum("ttft" in attempt.broken for attempt in attempts),
        "late_gap": sum("gap" in attempt.broken for attempt in attempts),
        "evictions": done.evictions,
        "memory": done.memory,
        "seconds": done.seconds,
        "ttft_p99": late["ttft"]["p99"] if "ttft" in late else None,
        "gap_p99": late["gap"]["p99"] if "gap" in late else None,
    }


def _find(table: Sequence[Any], name: str) -> Any:
    return next(item for item in table if item.name == name)


def _series(name: str) -> Series:
    found: Series = _find(SERIES, name)
    return found


@dataclass(frozen=True)
class Panel:
    """Goodput by series and clients (mean over seeds), of one model on one load."""

    machine: str
    load: str
    clients: tuple[int, ...]
    curves: Mapping[str, tuple[float, ...]]

    def ratios(
        self, ours: str = "past-future", others: Sequence[str] = ("tgi", "vllm")
    ) -> list[float]:
        """Ours to the best of the others, by clients; infinite where theirs is 0."""
        best = [max(values) for values in zip(*(self.curves[name] for name in others), strict=True)]
        pairs = zip(self.curves[ours], best, strict=True)
        return [mine / theirs if theirs else float("inf") for mine, theirs in pairs]


def panels(rows: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> list[Panel]:
    """Sum cells up; curves with missing cells are left out."""
    made = []
    for gpu in MACHINES:
        for load in LOADS:
            curves = {}
            for series in SERIES:
                keys = [
                    [Cell(gpu.name, load.name, clients, series.name, seed).key for seed in seeds]
                    for clients in gpu.clients
                ]
                if all(key in rows for group in keys for key in group):
                    curves[series.name] = tuple(
                        statistics.fmean(rows[key]["goodput"] for key in group) for group in keys
                    )
            made.append(Panel(gpu.name, load.name, gpu.clients, curves))
    return made


def figure(made: Sequence[Panel]) -> Figure:
    """The 12 panels."""
    drawn = Figure(figsize=(15, 9), layout="constrained")
    grid = drawn.subplots(len(MACHINES), len(LOADS), squeeze=False)
    for panel, axes in zip(made, grid.flat, strict=True):
        _draw(panel, axes)
    grid[0][0].legend(frameon=False, fontsize="small")
    for row in grid:
        row[0].set_ylabel("goodput, prompt and output tok/s")
    for axes in grid[-1]:
        axes.set_xlabel("clients")
    return drawn


def _draw(panel: Panel, axes: Axes) -> None:
    for name in (*MAIN, "past-future, cold", "vllm, late given up"):
        if name not in panel.curves:
            continue
        color = COLORS[_series(name).preset]
        style = ":" if name == "oracle" else "-" if name in MAIN else "--"
        width = 1.6 if name in MAIN else 0.9
        line: dict[str, Any] = {"marker": "o", "ms": 3, "lw": width, "color": color, "label": name}
        axes.plot(panel.clients, panel.curves[name], style, **line)
    ratio = max(panel.ratios())
    title = f"{panel.machine}, {panel.load}: up to {ratio:.2f} times"
    axes.set_title(title, fontsize="medium")
    axes.set_ylim(0, None)


def markdown(made: Sequence[Panel], facts: Mapping[str, object]) -> str:
    """The tables as a page."""
    best = max(made, key=lambda panel: max(panel.ratios()))
    lines = [
        "# Goodput of the Past-Future paper's figure 7, simulated",
        "",
        "Prompt and output tokens per second of good requests; method and terms are in",
        "`benchmarks/past_future_goodput.py`. The ratio is `past-future` to the better of `tgi`",
        "and `vllm` with the same number of clients; `cold` is the largest of `past-future, cold`,",
        "`late given up` the largest of `past-future, late given up` to the better of `tgi` and",
        "`vllm, late given up`; `oracle` is `past-future` to it at most clients.",
        "",
        f"Largest ratio: **{max(best.ratios()):.2f}** ({best.machine}, {best.load}).",
        "",
        *(f"- {name}: `{value}`" for name, value in facts.items()),
        "",
        "![goodput](goodput.png)",
        "",
        "| model | load | ratio, at clients | at most clients | cold | late given up | oracle |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for panel in made:
        ratios = panel.ratios()
        cold = _largest(panel, "past-future, cold", "tgi", "vllm")
        given_up = _largest(panel, "past-future, late given up", "tgi", "vllm, late given up")
        top = max(ratios)
        at = panel.clients[ratios.index(top)]
        share = panel.ratios(others=("oracle",))[-1]
        lines.append(
            f"| {panel.machine} | {panel.load} | {top:.2f}, {at} | {ratios[-1]:.2f} | "
            f"{cold} | {given_up} | {share:.2f} |"
        )
    for panel in made:
        lines += ["", f"## {panel.machine}, {panel.load}", ""]
        lines += ["| clients | " + " | ".join(map(str, panel.clients)) + " |"]
        lines += ["| --- |" + " --- |" * len(panel.clients)]
        for name, values in panel.curves.items():
            lines.append(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
        lines.append("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in panel.ratios()) + " |")
    return "\n".join(lines) + "\n"


def _largest(panel: Panel, ours: str, *others: str) -> str:
    known = {ours, *others} <= panel.curves.keys()
    return f"{max(panel.ratios(ours, others)):.2f}" if known else "-"


def gather(todo: Sequence[Cell], book: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Run what is not in the book yet."""
    rows = {}
    if book.exists():
        kept = [json.loads(line) for line in book.read_text().splitlines()]
        rows = {row["key"]: row for row in kept}
    missing = [cell for cell in todo if cell.key not in rows]
    with ProcessPoolExecutor(jobs) as pool, book.open("a") as file:
        running = [pool.submit(simulate, cell) for cell in missing]
        for number, future in enumerate(as_completed(running), len(todo) - len(missing) + 1):
            row = future.result()
            rows[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            shown = f"goodput {row['goodput']:,.0f}, took {row['wall_s']:.1f} s"
            print(f"{number}/{len(todo)} {row['key']}: {shown}", flush=True)
    return rows


def main() -> None:
    """Run everything, and write tables, numbers and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="simulations at a time")
    parser.add_argument("--main", action="store_true", help="only the paper's four curves")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that are done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/past_future_goodput")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        (out / "cells.jsonl").unlink(missing_ok=True)
    todo = list(cells(arguments.seeds, main=arguments.main))
    rows = gather(todo, out / "cells.jsonl", arguments.jobs)
    made = panels(rows, arguments.seeds)
    facts: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "seeds": arguments.seeds,
        "commit": revision(ROOT),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
    }
    data = {
        **facts,
        "largest_ratio": max(max(panel.ratios()) for panel in made),
        "panels": [{**asdict(panel), "ratios": panel.ratios()} for panel in made],
    }
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "results.md").write_text(markdown(made, facts))
    figure(made).savefig(out / "goodput.png", dpi=110)
    print(f"largest ratio {data['largest_ratio']:.2f}; see {out / 'results.md'}")


if __name__ == "__main__":
    main()
