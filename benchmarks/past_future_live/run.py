"""Run the experiment of README.md; see there.  Resumable and time-boxed.

python benchmarks/past_future_live/run.py --minutes 40
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec
import numpy as np
import uvloop

from penstock.bench.client import Target
from penstock.bench.drive import Rules
from penstock.bench.local import revision, serve
from penstock.bench.measure import Load as Press
from penstock.bench.measure import Measurement, measure
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result, machine
from penstock.bench.workload import SLOClass
from penstock.core.types import SLO

sys.path.insert(0, str(Path(__file__).parent))
import model
import report
from cells import BLOCK, KV_TOKENS, LOADS, PRESETS, Book, Cell, Load

TTFT_STEPS, GAP_STEPS = 200, 13
PATIENCE = 0.8
RETRIES = 1000  # the artifact retries without end; a cell's time is what ends it
WINDOW = 200
ROOT = Path(__file__).resolve().parents[2]
MODEL = model.M14.folder


@dataclass(frozen=True)
class Setting:
    """What all cells share; another setting makes other cells."""

    step_seconds: float
    seconds: float
    warmup: float
    threads: int

    @property
    def slo(self) -> SLO:
        """The bounds."""
        return SLO(ttft=TTFT_STEPS * self.step_seconds, gap=GAP_STEPS * self.step_seconds)


def main(
    *,
    minutes: float = 40.0,
    out: Path = ROOT / "benchmarks" / "results" / "past_future_live",
    loads: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    clients: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    presets: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = PRESETS,
    repeats: int = 3,
    seconds: float = 12.0,
    warmup: float = 4.0,
    threads: int = 1,
    history: int = WINDOW,
) -> None:
    """Measure what is not measured yet, for so many minutes, then write tables and figures.

    Args:
        minutes: start nothing new after this.
        out: where results go, and what was measured before is found.
        loads: names of the loads; by default all.
        clients: numbers of clients, in this order; by default those of each load.
        presets: schedulers, in this order within each turn.
        repeats: measurements of each cell.
        seconds: measured time of a cell.
        warmup: unmeasured time before it.
        threads: CPU threads of the engine.
        history: requests that past-future serves before it is measured.
    """
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    model.build()
    setting = _setting(out, seconds, warmup, threads)
    book = Book(out / "cells.jsonl", msgspec.json.encode(setting).decode())
    chosen = [load for load in LOADS if not loads or load.name in loads]
    todo = {
        load: [
            cell
            for repeat in range(repeats)
            for n in clients or load.clients
            for preset in presets
            if (cell := Cell(load.name, n, preset, repeat)).key not in book.rows
        ]
        for load in chosen
    }
    for load, cells in todo.items():
        later = sum(len(rest) for rest in list(todo.values())[chosen.index(load) :])
        left = end - time.monotonic()
        share = time.monotonic() + left * len(cells) / max(later, 1)
        _measure_load(load, cells, book, setting, share, history)
        report.write(book, setting.slo, facts(setting), out)


def _setting(out: Path, seconds: float, warmup: float, threads: int) -> Setting:
    """The setting of this folder, calibrated by its first run."""
    file = out / "setting.json"
    if file.exists():
        setting = msgspec.json.decode(file.read_bytes(), type=Setting)
        if (setting.seconds, setting.warmup, setting.threads) == (seconds, warmup, threads):
            return setting
    step = _median_step(threads)
    setting = Setting(step, seconds, warmup, threads)
    file.write_bytes(msgspec.json.encode(setting) + b"\n")
    return setting


def _median_step(threads: int) -> float:
    """Seconds per decode step with full memory: the median TPOT under the oracle."""
    print("calibrating", flush=True)
    with serve(arguments("oracle", threads)) as url:
        result = _go(url, LOADS[0], Press(clients=20, duration=25, warmup=5), None, 0)
    rows = [a.latency.tpot for a in result.attempts if a.latency.tpot and a.output_tokens > 50]
    step = round(statistics.median(rows), 4)
    print(f"a decode step with full memory takes {step * 1000:.1f} ms", flush=True)
    return step


def arguments(preset: str, threads: int) -> list[str]:
    """The server's flags."""
    window = ["--parameters.window", str(WINDOW)] if preset == "past-future" else []
    return [
        str(MODEL), "--preset", preset, *window, "--dtype", "bfloat16",
        "--kv-tokens", str(KV_TOKENS), "--block-size", str(BLOCK), "--max-batch", "64",
        "--max-step-tokens", "96",
        "--no-prefix-cache", "--threads", str(threads), "--trace-lengths",
    ]  # fmt: skip


def _measure_load(
    load: Load, cells: list[Cell], book: Book, setting: Setting, end: float,
    history: int,
) -> None:  # fmt: skip
    if not cells:
        return
    with ExitStack() as stack:
        names = dict.fromkeys(cell.preset for cell in cells)
        servers = {
            name: stack.enter_context(serve(arguments(name, setting.threads))) for name in names
        }
        if "past-future" in servers and history:
            print(f"{load.name}: {history} requests for past-future's history", flush=True)
            _fill_history(servers["past-future"], load, history, end)
        for cell in cells:
            if time.monotonic() + setting.seconds + setting.warmup > end:
                print(f"{load.name}: time is up before {cell.key}", flush=True)
                return
            press = Press(cell.clients, 1.0, setting.seconds + setting.warmup, setting.warmup)
            result = _go(servers[cell.preset], load, press, setting.slo, cell.repeat)
            book.add(cell, numbers(result))
            print(f"{cell.key}: {_short(result)}", flush=True)


def _fill_history(url: str, load: Load, count: int, end: float) -> None:
    requests = load.workload(seed=99)
    rows = [i % len(requests) for i in range(count)]
    # One-token prompts: only the output lengths are to be learned, and this is quicker.
    requests = replace(requests.take(rows), prompt=np.ones(count, dtype=np.int64))
    target, press = Target(url, MODEL.name), Press(clients=40)
    rules = Rules(load.scaled_cap)
    job = Measurement(target, requests, rules, press, Prompts(requests, 99))

    async def within() -> None:
        async with asyncio.timeout((end - time.monotonic()) / 2):
            await measure(job)

    try:
        asyncio.run(within())
    except TimeoutError:
        print(f"{load.name}: no time to fill the history; past-future starts colder", flush=True)


def _go(url: str, load: Load, press: Press, slo: SLO | None, repeat: int) -> Result:
    return _run(_job(url, load, press, slo, repeat))


def _job(url: str, load: Load, press: Press, slo: SLO | None, repeat: int) -> Measurement:
    requests = load.workload(seed=repeat).with_classes([SLOClass(slo=slo or SLO())], repeat)
    rules = Rules(load.scaled_cap, retries=RETRIES, patience=PATIENCE)
    target = Target(url, MODEL.name)
    return Measurement(target, requests, rules, press, Prompts(requests, repeat))


def _run(job: Measurement) -> Result:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(job))


def numbers(result: Result) -> dict[str, object]:
    """What is kept of a cell."""
    summary, server = result.summary, result.server
    return {
        "summary": summary.to_dict(),
        "evictions": server.evictions,
        "kv_use": server.kv_use_mean,
        "running": server.running_mean,
        "client_cpu": result.client_cpu,
        "load_average": os.getloadavg()[0],
        "finished": _finished(result),
    }


def _finished(result: Result) -> list[list[float | None]]:
    """Completed attempts of the window as (prompt, output, ttft, tpot, gap).

    Other bounds can be tried on them later.
    """
    start, stop = (result.start + t for t in result.window)
    return [
        [a.prompt_tokens, a.output_tokens, *(
            None if v is None else round(v, 4)
            for v in (a.latency.ttft, a.latency.tpot, a.latency.gap)
        )]
        for a in result.attempts
        if a.end == "completed" and start < a.ended <= stop
    ]  # fmt: skip


def _short(result: Result) -> str:
    s = result.summary
    return (
        f"goodput {s.goodput_output_tps:.0f} of {s.throughput_output_tps:.0f} tok/s, "
        f"evictions {result.server.evictions}, KV {result.server.kv_use_mean or 0:.0%}, "
        f"running {result.server.running_mean or 0:.0f}, ends {s.ends}, "
        f"broken {s.classes['default'].broken if s.classes else {}}"
    )


def facts(setting: Setting) -> dict[str, object]:
    """What a reader needs to judge or repeat the numbers."""
    return {
        "command": " ".join(["python", *(str(a) for a in sys.argv)]),
        "commit": revision(ROOT),
        **machine(),
        "step_seconds": setting.step_seconds,
        "seconds": setting.seconds,
        "warmup": setting.warmup,
        "threads": setting.threads,
        "server": " ".join(arguments("PRESET", setting.threads)),
    }


if __name__ == "__main__":
    cyclopts.run(main)
