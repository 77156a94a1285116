"""What is compared: loads, schedulers, and the load on which step times are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from penstock.bench.fitted import fitted
from penstock.bench.prompts import Prompts
from penstock.bench.workload import Lengths, Workload, poisson, synthetic
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.types import SLO
from penstock.sim.run import Job, Source
from penstock.sim.sources import ClosedLoop, OpenLoop

PRESETS: dict[str, dict[str, float]] = {
    "past-future": {"window": 50},  # so that it learns within a run
    "vllm": {},
    "tgi": {},
}
SEED = 3
MAX_BATCH, BLOCK, STEP_TOKENS = 64, 16, 96
CALIBRATION_KV = 20_000
SHORT, LONG = ("uniform:8-100", "uniform:16-120"), ("uniform:100-1000", "uniform:8-150")
CALIBRATION = (
    (1, LONG), (16, SHORT), (2, LONG), (8, SHORT), (4, LONG), (32, SHORT), (8, LONG), (3, SHORT),
    (16, LONG),
)  # fmt: skip
"""Closed loops of (clients, lengths of prompts and outputs).

Short and long ones, since a price per request and one per token of context cannot be told apart
where all contexts are alike.
"""


@dataclass(frozen=True)
class Load:
    """A load.

    Attributes:
        lengths: the quantile fit, and the factor on it.
        clients, rate: a closed loop, or requests per second.
        kv_tokens: of the machine.
        cap: what policies are told, and where outputs are cut.
        ttft_steps: bound on TTFT, in typical decode steps.
    """

    name: str
    lengths: str
    scale: float
    requests: int
    kv_tokens: int
    cap: int
    ttft_steps: int
    clients: int | None = None
    rate: float | None = None

    def workload(self) -> Workload:
        """The requests, their outputs cut at the cap."""
        made = fitted(self.lengths, self.requests, SEED).scaled(self.scale)
        assert made.output is not None
        made = replace(made, output=np.minimum(made.output, self.cap))
        if self.rate is not None:
            made = made.with_arrivals(poisson(len(made), self.rate, SEED))
        return made

    def source(self, workload: Workload, slo: SLO) -> Source:
        """The requests as they come."""
        made = jobs(workload, self.cap, slo)
        return OpenLoop(made) if self.clients is None else ClosedLoop(made, self.clients)


LOADS = (
    Load("sharegpt-o1 / 16, 16 clients", "sharegpt-o1", 1 / 16, 480, 2000, 450, 400, clients=16),
    Load("azure / 4, 12 req/s", "azure-conversation", 1 / 4, 400, 3200, 250, 150, rate=12),
)


def jobs(workload: Workload, cap: int, slo: SLO) -> list[Job]:
    """Requests as runtimes take them."""
    assert workload.output is not None
    times = np.zeros(len(workload)) if workload.arrival is None else workload.arrival
    rows = zip(times.tolist(), workload.prompt.tolist(), workload.output.tolist(), strict=True)
    return [Job(str(i), *row, cap, slo, request=i) for i, row in enumerate(rows)]


def prompts_of(workload: Workload) -> list[list[int]]:
    """Their token ids, made before the clock runs."""
    made = Prompts(workload, SEED)
    return [made.ids(i) for i in range(len(workload))]


def policy(preset: str) -> Policy:
    """A fresh one."""
    return presets.build(preset, seed=SEED, **PRESETS[preset])


def calibration() -> list[tuple[Workload, int]]:
    """Requests and clients of the load on which step times are learned."""
    return [
        (synthetic(Lengths.parse(prompt), Lengths.parse(output), 100, 100 + index), clients)
        for index, (clients, (prompt, output)) in enumerate(CALIBRATION)
    ]


def check(sequence: Sequence[Load] = LOADS) -> None:
    """Refuse a load that its machine can never serve."""
    for load in sequence:
        made = load.workload()
        if made.prompt.max() + load.cap > load.kv_tokens:
            msg = (
                f"{load.name}: prompts to {made.prompt.max()} with cap {load.cap} do not fit "
                f"{load.kv_tokens} tokens"
            )
            raise ValueError(msg)
