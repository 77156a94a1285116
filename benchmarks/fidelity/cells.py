"""What is compared: loads, schedulers, and the load on which step times are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
CALIBRATION = ((1, 6), (2, 10), (4, 16), (8, 28), (16, 48), (32, 80))
"""(clients, requests): closed loops one after another."""


@dataclass(frozen=True)
class Load:
    """A load.

    Attributes:
        lengths: the quantile fit, and the factor on it.
        clients, rate: a closed loop, or requests per second.
        kv_tokens: of the machine.
        cap: what policies are told.
    """

    name: str
    lengths: str
    scale: float
    requests: int
    kv_tokens: int
    cap: int
    clients: int | None = None
    rate: float | None = None

    def workload(self) -> Workload:
        """The requests."""
        made = fitted(self.lengths, self.requests, SEED).scaled(self.scale)
        if self.rate is not None:
            made = made.with_arrivals(poisson(len(made), self.rate, SEED))
        return made

    def source(self, workload: Workload, slo: SLO) -> Source:
        """The requests as they come."""
        made = jobs(workload, self.cap, slo)
        return OpenLoop(made) if self.clients is None else ClosedLoop(made, self.clients)


LOADS = (
    Load("sharegpt-o1 / 16, 16 clients", "sharegpt-o1", 1 / 16, 240, 2000, 450, clients=16),
    Load("azure-conversation / 4, 10 req/s", "azure-conversation", 1 / 4, 300, 3200, 250, rate=10),
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
    made = []
    for index, (clients, count) in enumerate(CALIBRATION):
        lengths = Lengths.parse("uniform:8-600"), Lengths.parse("uniform:8-300")
        made.append((synthetic(*lengths, count, 100 + index), clients))
    return made


def check(sequence: Sequence[Load] = LOADS) -> None:
    """Refuse a load that its machine can never serve."""
    for load in sequence:
        made = load.workload()
        assert made.output is not None
        if made.output.max() > load.cap or made.prompt.max() + load.cap > load.kv_tokens:
            msg = (
                f"{load.name}: outputs to {made.output.max()}, prompts to {made.prompt.max()}; "
                f"with cap {load.cap} they do not fit {load.kv_tokens} tokens"
            )
            raise ValueError(msg)
