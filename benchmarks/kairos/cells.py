"""The study's loads and machines, and what is measured of one simulated cell.

Loads: ``synthetic``, whose prompts are lognormal (median 2,500 tokens, sigma 1) but for a share of
``tail`` that is uniform from 32K to 128K, with lognormal outputs (median 400, sigma 0.9, at most
4,096); and ``mooncake``, rows of Mooncake's conversation trace in random order.  Arrivals are
Poisson.  The paper's own trace is private; it says only that lengths are long-tailed.

Machine: ``testbed.json``, one instance per role unless said otherwise, chunks of 8,192 tokens, one
million tokens of KV per decode instance, hand-offs of 127 KB per token over 450 GB/s.  The paper
states neither chunks, KV memory nor batch effects; these are assumptions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from penstock.bench import traces
from penstock.core.dispatcher import Dispatcher
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.policies import presets
from penstock.core.policies.back_pressure import BackPressure
from penstock.core.policies.base import Policy
from penstock.core.policies.dispatch import DispatchPolicy
from penstock.core.policies.fleets import build_fleet
from penstock.core.types import SLO, Capabilities, Role
from penstock.sim import profiles
from penstock.sim.cluster import run_cluster
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.link import Link
from penstock.sim.run import Job
from penstock.sim.sources import OpenLoop

HERE = Path(__file__).resolve().parent
TESTBED = str(HERE / "testbed.json")
CAP = 4096
LONG = 32_768
BUCKETS = ((0, 2_048), (2_048, 8_192), (8_192, LONG), (LONG, 1 << 20))
KV_BYTES, LINK_LATENCY = 126_976, 1e-3


@dataclass(frozen=True)
class Cell:
    """One simulation.

    Attributes:
        load: synthetic, or the path of a trace.
        qps: requests per second.
        preset: with ``order`` and ``parameters`` over its own.
        tail: share of long prompts, of ``synthetic``.
        slo_scale: factor on TTFT 8 s and TPOT 50 ms.
        noise: sigma of a lognormal factor on every step's time, which no policy foresees.
        straggler: whether a request comes first that nobody can serve as promised.
        back_pressure: factor; 0: none.
        bandwidth: of the link into a decode instance, in GB/s.
        stream: KV crosses it chunk by chunk.
    """

    load: str
    qps: float
    preset: str
    seed: int = 0
    order: str | None = None
    parameters: dict[str, float] = field(default_factory=dict)
    requests: int = 1000
    prefill: int = 1
    decode: int = 1
    chunk: int = 8192
    kv_tokens: int = 1_000_000
    tail: float = 0.02
    slo_scale: float = 1.0
    noise: float = 0.0
    straggler: bool = False
    back_pressure: float = 0.0
    bandwidth: float = 450.0
    stream: bool = False


class Noisy:
    """A machine whose steps take longer or shorter than its model says."""

    wants_longest = True

    def __init__(self, model: LatencyModel, sigma: float, seed: int) -> None:
        self._model = model
        self._sigma = sigma
        self._rng = np.random.default_rng(seed)

    def seconds(self, load: StepLoad) -> float:
        """The model's, times a factor with a mean of 1."""
        factor = self._rng.lognormal(-(self._sigma**2) / 2, self._sigma)
        return self._model.seconds(load) * float(factor)

    def decode_line(self, decoding: int) -> None:
        """Each step differs."""
        del decoding


class Timed:
    """An order and a pack that note how long they take."""

    def __init__(self, inner: Any, method: str, spent: list[float]) -> None:
        self._inner = inner
        self._spent = spent
        setattr(self, method, self._timed(getattr(inner, method)))

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            began = perf_counter()
            answer = call(*arguments)
            self._spent.append(perf_counter() - began)
            return answer

        return timed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def jobs(cell: Cell) -> list[Job]:
    """Its requests; the same for all presets."""
    rng = np.random.default_rng([cell.seed, 7])
    count = cell.requests
    if cell.load == "synthetic":
        prompt = rng.lognormal(np.log(2500), 1.0, count)
        long = rng.random(count) < cell.tail
        prompt = np.where(long, rng.uniform(LONG, 131_072, count), prompt).clip(64, 131_072)
        output = rng.lognormal(np.log(400), 0.9, count).clip(2, CAP)
    else:
        trace = traces.load(Path(cell.load))
        assert trace.output is not None
        rows = rng.choice(len(trace), count, replace=False)
        prompt, output = trace.prompt[rows], trace.output[rows].clip(2, CAP)
    arrival = rng.exponential(1 / cell.qps, count).cumsum()
    slo = SLO(ttft=8.0 * cell.slo_scale, tpot=0.05 * cell.slo_scale)
    made = [
        Job(str(i), float(arrival[i]), int(prompt[i]), int(output[i]), CAP, slo, request=i)
        for i in range(count)
    ]
    if cell.straggler:
        hopeless = SLO(ttft=8.0, tpot=0.001)
        made.insert(0, Job("straggler", 0.0, 2000, CAP, CAP, hopeless, request=count))
    return made


def policy_of(cell: Cell, number: int, latency: LatencyModel, spent: list[float]) -> Policy:
    """Of one instance, with its planning timed."""
    options: dict[str, Any] = dict(cell.parameters)
    made = presets.build(
        cell.preset, seed=1000 * cell.seed + number, order=cell.order, profile=latency, **options
    )
    rank = None if made.rank is None else Timed(made.rank, "rank", spent)
    pack = None if made.pack is None else Timed(made.pack, "choose", spent)
    return replace(made, rank=rank, pack=pack)


def simulate(cell: Cell, spent: list[float]) -> ClusterRun:
    """Run it."""
    model = profiles.load(TESTBED)
    latency = Noisy(model, cell.noise, cell.seed) if cell.noise else model
    dispatch: DispatchPolicy = build_fleet(cell.preset, seed=cell.seed).dispatch
    if cell.back_pressure:
        held = BackPressure(np.random.default_rng(cell.seed), cell.back_pressure)
        dispatch = replace(dispatch, back_pressure=held)
    roles = [Role.PREFILL] * cell.prefill + [Role.DECODE] * cell.decode
    machine = Capabilities(cell.kv_tokens // 16, 16, 256, cell.chunk, 140_000)
    return run_cluster(
        OpenLoop(jobs(cell)),
        machine,
        roles,
        lambda number: policy_of(cell, number, model, spent),
        latency,
        Dispatcher(dispatch),
        link=Link(KV_BYTES, cell.bandwidth * 1e9, LINK_LATENCY),
        stream=cell.stream,
    )


def measure(cell: Cell) -> dict[str, Any]:
    """What came of it: shares in percent, times in seconds, speed in tokens per second."""
    began, spent = perf_counter(), list[float]()
    done = simulate(cell, spent)
    records = [record for record in done.records if record.job.id != "straggler"]
    prompt = np.array([record.job.prompt for record in records])
    ttft = np.array([record.latency.ttft for record in records], dtype=np.float64)
    tpot = np.array([record.latency.tpot for record in records], dtype=np.float64)
    gap = np.array([record.latency.gap for record in records], dtype=np.float64)
    slo = records[0].job.slo
    assert slo.ttft is not None
    assert slo.tpot is not None
    in_time, in_pace = ttft <= slo.ttft, tpot <= slo.tpot
    both = in_time & in_pace
    names = ["up to 2K", "2K to 8K", "8K to 32K", "above 32K"]
    members = [(prompt > low) & (prompt <= high) for low, high in BUCKETS]
    return {
        "cell": asdict(cell),
        "ttft": 100 * float(in_time.mean()),
        "tpot": 100 * float(in_pace.mean()),
        "e2e": 100 * float(both.mean()),
        "speed": float(np.median(1 / tpot)),
        "buckets": {
            name: 100 * float(both[rows].mean())
            for name, rows in zip(names, members, strict=True)
            if rows.any()
        },
        "longest_wait_s": float(ttft.max()),
        "gap_p99_s": float(np.quantile(gap, 0.99)),
        "evictions": sum(each.evictions for each in done.instances),
        "planning_p50_us": 1e6 * float(np.median(spent)) if spent else 0.0,
        "planning_p99_us": 1e6 * float(np.quantile(spent, 0.99)) if spent else 0.0,
        "finished": len(records),
        "simulated_s": done.seconds,
        "took_s": perf_counter() - began,
    }
