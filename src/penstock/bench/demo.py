"""``penstock demo``: what admission does to goodput, on this machine, with the included model.

A real conversation first, then the same load against four schedulers in turn:
real lengths (ShareGPT-o1, scaled down), real HTTP, and KV memory so small that
it binds.  Bounds are set in decode steps of this machine, so the picture is
the same on a slow and on a fast one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import msgspec
from cyclopts import Parameter

from penstock.bench import compare
from penstock.bench.client import Target
from penstock.bench.compare import Entry
from penstock.bench.drive import HookError, Rules
from penstock.bench.fitted import fitted
from penstock.bench.local import ServeError, serve
from penstock.bench.measure import Load, Measurement, run
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result, seconds
from penstock.bench.workload import SLOClass, Workload
from penstock.core.types import SLO

if TYPE_CHECKING:
    from rich.console import Console

QUESTION = "Who are you?"
SCALE = 1 / 6
CAP = 2000  # the paper's 12,000, scaled
KV_TOKENS = 4800  # holds about 18 such requests: on a CPU, more make steps longer
CLIENTS = 24
TTFT_STEPS, GAP_STEPS = 150, 15  # a request ends about every 20 steps
WINDOW = 40  # of past-future, as LightLLM's server has it: to fill the paper's 1,000 takes too long
SPECIAL_TOKENS = tuple(range(7))  # of the included model's vocabulary


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each part takes, in seconds.

    ``steps``: the measured time holds at least so many decode steps, unless that is more than
    ``most`` seconds: on a slow machine less happens in the same time.  ``history``: past-future
    learns until as many requests have ended as its window holds, at most so long.  It begins with
    two or three at once, since it knows nothing: a fixed time would teach a slow machine nothing.
    """

    presets: tuple[str, ...]
    calibration: float
    warmup: float
    measured: float
    history: float
    steps: int
    most: float

    def lasting(self, seconds: float, slo: SLO) -> float:
        """Seconds of a part that is to last ``seconds``, with :func:`bounds` of this machine."""
        step = (slo.gap or 0.0) / GAP_STEPS
        return max(seconds, min(self.steps * step, self.most))


FULL = Plan(("oracle", "tgi", "vllm", "past-future"), 6.0, 4.0, 20.0, 90.0, 4000, 45.0)
QUICK = Plan(("tgi", "vllm", "past-future"), 3.0, 2.0, 6.0, 20.0, 0, 0.0)


def demo(
    *,
    quick: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    seed: int = 0,
) -> int:
    """Talk to the included model, then compare four schedulers on the same load.

    Takes two to five minutes on two cores, and writes a figure and an HTML report.

    Args:
        quick: About a minute: without the oracle, and with short, noisier measurements.
        out: Folder for the report; by default a new temporary one.
        seed: Of the requests.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 110
    folder = out or Path(tempfile.mkdtemp(prefix="penstock-demo-"))
    began = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries, slo = _compare(console, QUICK if quick else FULL, seed)
        png, page = _report(console, entries, slo, folder)
    except (ServeError, HookError, ValueError, OSError, httpx.HTTPError) as error:
        sys.stderr.write(f"penstock demo: {error}\n")
        return 1
    console.print(f"figure: {png}", highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    console.print(f"[dim]{time.monotonic() - began:.0f} s in all[/dim]")
    return 0


def _compare(console: Console, plan: Plan, seed: int) -> tuple[list[Entry], SLO]:
    """Run every preset; the first server also talks, and is the clock for the bounds."""
    requests = fitted("sharegpt-o1", 1000, seed).scaled(SCALE)
    entries: list[Entry] = []
    slo: SLO | None = None
    for preset in plan.presets:
        with serve(arguments("demo", preset)) as url:
            if slo is None:
                _talk(console, url)
                load = Load(CLIENTS, duration=plan.calibration)
                with console.status(f"timing a decode step ({plan.calibration:.0f} s)"):
                    slo = bounds(console, _go(url, requests, load, SLO(), seed + 1))
            if preset == "past-future":
                load = Load(CLIENTS, duration=plan.history, completed=WINDOW)
                with console.status(f"past-future learns lengths (up to {plan.history:.0f} s)"):
                    _go(url, requests, load, SLO(), seed + 1)
            measured = plan.lasting(plan.measured, slo)
            load = Load(CLIENTS, duration=plan.warmup + measured, warmup=plan.warmup)
            with console.status(f"{CLIENTS} clients on {preset} ({load.duration:.0f} s)"):
                result = _go(url, requests, load, slo, seed)
        if not result.summary.ends.get("completed"):
            msg = f"no request completed under {preset}: {result.summary.errors or 'too slow'}"
            raise ValueError(msg)
        entries.append(Entry(preset, result))
        console.print(
            f"  {entries[-1].name}: goodput {result.summary.goodput_output_tps:.0f} tok/s",
            highlight=False,
        )
    order = list(compare.NAMES)
    return sorted(entries, key=lambda e: order.index(e.preset)), slo or SLO()


def arguments(model: str, preset: str) -> list[str]:
    """Flags of the server."""
    learning = ["--parameters.window", str(WINDOW)] if preset == "past-future" else []
    return [
        model, "--preset", preset, *learning, "--kv-tokens", str(KV_TOKENS), "--max-batch", "64",
        "--max-step-tokens", "128", "--no-prefix-cache", "--trace-lengths", "--threads", "1",
    ]  # fmt: skip


def bounds(console: Console, learned: Result) -> SLO:
    """The SLO in decode steps of the median length.

    Raises:
        ValueError: nothing completed.
    """
    times = [a.latency.tpot for a in learned.attempts if a.latency.tpot is not None]
    if not times:
        msg = f"the included model produced nothing: {learned.summary.errors}"
        raise ValueError(msg)
    step = statistics.median(times)
    slo = SLO(ttft=TTFT_STEPS * step, gap=GAP_STEPS * step)
    console.print(
        f"A decode step takes {step * 1000:.1f} ms here, so the SLO is: first token within "
        f"{seconds(slo.ttft)}, no gap over {seconds(slo.gap)}.",
        highlight=False,
    )
    return slo


def _go(url: str, requests: Workload, load: Load, slo: SLO, seed: int) -> Result:
    requests = requests.with_classes([SLOClass(slo=slo)], seed)
    rules = Rules(CAP, retries=1000, patience=0.8, banned=SPECIAL_TOKENS)
    prompts = Prompts(requests, seed)
    return run(Measurement(Target(url, "demo"), requests, rules, load, prompts))


def _talk(console: Console, url: str) -> None:
    """One streamed chat completion, shown as it comes."""
    console.print(f"[bold]you:[/bold] {QUESTION}", highlight=False)
    console.print("[bold]model:[/bold] ", end="")
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 80,
        "temperature": 0.0,
        "stream": True,
    }
    address = f"{url}/v1/chat/completions"
    with httpx.stream("POST", address, json=body, timeout=60) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not data.startswith("{"):
                continue
            for choice in msgspec.json.decode(data)["choices"]:
                text = choice.get("delta", {}).get("content") or ""
                console.print(text, end="", highlight=False, markup=False)
    console.print()


def _report(
    console: Console, entries: Sequence[Entry], slo: SLO, folder: Path
) -> tuple[Path, Path]:
    title = f"Goodput of {len(entries)} schedulers on the same load"
    console.print(compare.table(entries, title))
    lead = [
        (
            f"{CLIENTS} clients in closed loop, ShareGPT-o1 lengths divided by {1 / SCALE:.0f}, "
            f"{KV_TOKENS} KV tokens, max_tokens {CAP} for all; bounds: first token within "
            f"{seconds(slo.ttft)}, no gap over {seconds(slo.gap)}."
        ),
        (
            "Only the engine knows the true output lengths, except under the oracle, which "
            "shows what knowing them would bring."
        ),
    ]
    return compare.write(entries, title, lead, folder, "penstock-demo")
