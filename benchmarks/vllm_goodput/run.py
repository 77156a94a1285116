"""Goodput of vLLM with its own scheduler and with Penstock's, live, side by side.

    make .venv-vllm/.done
    .venv/bin/python benchmarks/vllm_goodput/run.py --vllm-python .venv-vllm/bin/python

The load is that of ``penstock demo`` (ShareGPT-o1's lengths, scaled; KV memory so small that it
binds; clients that start over when a bound is broken), the engine is vLLM's CPU build with the
included model.  All sides have the same flags, the same middleware and the hook that ends outputs
at the trace's length (``penstock.vllm.TracedScheduler`` is vLLM's scheduler with that hook and
nothing else); no policy but the oracle is told a length.  Sides take turns, with a fresh server
each.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from penstock.bench.client import Target
from penstock.bench.drive import Rules
from penstock.bench.fitted import fitted
from penstock.bench.local import free_port, revision, running
from penstock.bench.measure import Load, Measurement, run
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result, machine
from penstock.bench.workload import SLOClass
from penstock.core.types import SLO

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src/penstock/models/demo"
SCALE, CAP, WINDOW = 1 / 6, 2000, 40
BLOCK, BLOCKS = 32, 151  # 4,800 tokens; vLLM keeps a block for itself
TTFT_STEPS, GAP_STEPS = 150, 15
PRESETS: dict[str, dict[str, Any] | None] = {
    "vLLM": None,
    "vllm": {},
    "tgi": {},
    "past-future": {"window": WINDOW},
    "oracle": {},
}
"""Sides: vLLM's own scheduler, and presets of Penstock's with their parameters."""


@dataclass(frozen=True)
class Setting:
    """What all sides share."""

    python: str
    clients: int
    history: float
    warmup: float
    seconds: float


def flags(side: str) -> list[str]:
    """The server's command line, without its interpreter and port."""
    parameters = PRESETS[side]
    plugin: dict[str, Any] = {"bench": {"trace_lengths": True}}
    scheduler = "penstock.vllm.TracedScheduler"
    if parameters is not None:
        scheduler = "penstock.vllm.Scheduler"
        plugin["scheduler"] = {"preset": side, "parameters": parameters}
    return [
        "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO), "--served-model-name",
        "demo", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
        "--max-num-seqs", "64", "--max-num-batched-tokens", "512", "--block-size", str(BLOCK),
        "--num-gpu-blocks-override", str(BLOCKS), "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
        "--scheduler-cls", scheduler, "--middleware", "penstock.vllm.Middleware",
        "--additional-config", json.dumps({"penstock": plugin}),
    ]  # fmt: skip


@contextmanager
def served(setting: Setting, side: str) -> Iterator[str]:
    """A server of this side; yields its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [setting.python, *flags(side), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with running(f"vLLM ({side})", command, environment, f"{url}/health", 180):
        yield url


def press(url: str, load: Load, slo: SLO, seed: int) -> Result:
    """One measurement."""
    requests = fitted("sharegpt-o1", 1000, seed).scaled(SCALE)
    requests = requests.with_classes([SLOClass(slo=slo)], seed)
    rules = Rules(CAP, retries=1000, patience=0.8)
    return run(
        Measurement(Target(url, "demo"), requests, rules, load, Prompts(requests, seed, low=7))
    )


def bounds(setting: Setting) -> tuple[SLO, float]:
    """Promises in decode steps of this machine, measured under the oracle."""
    with served(setting, "oracle") as url:
        result = press(url, Load(setting.clients, duration=20, warmup=5), SLO(), 99)
    rows = [a.latency.tpot for a in result.attempts if a.latency.tpot and a.output_tokens > 50]
    step = statistics.median(rows)
    return SLO(ttft=TTFT_STEPS * step, gap=GAP_STEPS * step), step


def measure(setting: Setting, side: str, slo: SLO, seed: int) -> dict[str, Any]:
    """One side, once: it learns first, and is then measured."""
    with served(setting, side) as url:
        learn = Load(setting.clients, duration=setting.history, completed=2 * WINDOW)
        press(url, learn, SLO(), seed + 1000)
        load = Load(
            setting.clients, duration=setting.warmup + setting.seconds, warmup=setting.warmup
        )
        result = press(url, load, slo, seed)
    return {
        "side": side,
        "goodput": result.summary.goodput_output_tps,
        "throughput": result.summary.throughput_output_tps,
        "attainment": result.summary.attainment,
        "evictions": result.server.evictions,
        "kv_use": result.server.kv_use_mean,
        "ends": dict(result.summary.ends),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Medians by side, goodput against vLLM's own scheduler."""
    lines = [
        "| in vLLM | goodput, tok/s (rounds) | ratio | throughput | attained | evictions | KV |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = {row["round"]: row["goodput"] for row in rows if row["side"] == "vLLM"}
    for side in dict.fromkeys(row["side"] for row in rows):
        mine = [row for row in rows if row["side"] == side]
        middle = {
            name: statistics.median(row[name] or 0.0 for row in mine)
            for name in ("goodput", "throughput", "attainment", "evictions", "kv_use")
        }
        ratios = [row["goodput"] / base[row["round"]] for row in mine if base.get(row["round"])]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        name = "vLLM's own" if side == "vLLM" else f"Penstock, `{side}`"
        each = ", ".join(f"{row['goodput']:.0f}" for row in mine)
        lines.append(
            f"| {name} | {middle['goodput']:.0f} ({each}) | {ratio} | {middle['throughput']:.0f} |"
            f" {middle['attainment']:.0%} | {middle['evictions']:.0f} | {middle['kv_use']:.0%} |"
        )
    return "\n".join(lines)


def main(
    *,
    vllm_python: str,
    rounds: int = 3,
    clients: int = 24,
    history: float = 60.0,
    warmup: float = 5.0,
    seconds: float = 40.0,
    sides: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = tuple(PRESETS),
    out: Path = ROOT / "benchmarks/results/vllm_goodput",
) -> None:
    """Measure all sides in turn, and write a table.

    Args:
        vllm_python: interpreter that has vLLM and Penstock.
        rounds: turns.
        clients: that have one request each at a time.
        history: most seconds in which a side may learn lengths before it is measured.
        warmup: seconds that are not measured.
        seconds: measured seconds.
        sides: which of them.
        out: results, without their endings.
    """
    setting = Setting(vllm_python, clients, history, warmup, seconds)
    slo, step = bounds(setting)
    print(f"a decode step takes {step * 1000:.1f} ms; {slo}", flush=True)
    rows: list[dict[str, Any]] = []
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            rows.append({"round": turn, **measure(setting, side, slo, turn)})
            print(rows[-1], flush=True)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "commit": revision(ROOT),
        **machine(),
        "step_seconds": step,
        "slo": {"ttft": slo.ttft, "gap": slo.gap},
        "flags": [word.replace(f"{ROOT}/", "") for word in flags("past-future")],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    page = f"{table(rows)}\n\n```json\n{json.dumps(facts, indent=1)}\n```\n"
    out.with_suffix(".md").write_text(page)
    print(table(rows))


if __name__ == "__main__":
    cyclopts.run(main)
