"""One cell of the study of slices: a preset on several simulated instances under Poisson load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from penstock.bench.fitted import fitted
from penstock.core.dispatcher import Dispatcher
from penstock.core.policies import presets
from penstock.core.policies.fleets import FLEETS, build_fleet
from penstock.core.types import Capabilities, Role
from penstock.sim import profiles
from penstock.sim.cluster import run_cluster
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.run import Job
from penstock.sim.slicing import Priced, cost_of, price
from penstock.sim.sources import OpenLoop

PROFILE = "llama-2-13b/a100-80g"
KV_TOKENS = 64_000
MOST = 1024  # tokens of a prompt, tokens of an output, and requests of a batch
SECONDS = 200


@dataclass(frozen=True)
class Cell:
    """What to simulate.

    Attributes:
        part: of the study.
        padded: static batches are rectangles; None: where the preset has static batches.
    """

    part: str
    preset: str
    lengths: str
    rate: float
    instances: int = 8
    seed: int = 0
    place: str | None = None
    parameters: tuple[tuple[str, float], ...] = ()
    padded: bool | None = None

    @property
    def label(self) -> str:
        """The preset and what differs from its defaults."""
        changes = [f"{key}={value:g}" for key, value in self.parameters]
        changes += [self.place] if self.place else []
        changes += ["paged"] if self.padded is False else []
        return " ".join((self.preset, *changes))


def jobs(cell: Cell) -> list[Job]:
    """Poisson arrivals for so many seconds; lengths drawn from a fit, cut at the maxima."""
    count = int(cell.rate * SECONDS)
    drawn = fitted(cell.lengths, count, cell.seed)
    assert drawn.output is not None
    rng = np.random.default_rng([cell.seed, 7])
    arrivals = np.cumsum(rng.exponential(1 / cell.rate, count)).tolist()
    prompts = np.minimum(drawn.prompt, MOST).tolist()
    outputs = np.minimum(drawn.output, MOST).tolist()
    return [
        Job(str(index), *row, MOST, request=index)
        for index, row in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]


@cache
def priced() -> Priced:
    """Prices of slices on the study's instances."""
    return price(profiles.load(PROFILE))


def simulate(cell: Cell) -> ClusterRun:
    """Run a cell."""
    sliced = cell.preset in FLEETS
    # SCLS's baselines place in turn; their instances know nothing of each other.
    place = cell.place or (None if sliced else "round-robin")
    fleet = build_fleet(cell.preset, place=place, seed=cell.seed, parameters=dict(cell.parameters))
    dispatch = fleet.dispatch
    cost = None
    if dispatch.needs_cost:
        cost = cost_of(
            priced().model,
            slice_tokens=dispatch.priced_tokens,
            safety=dispatch.safety,
            most=MOST,
        )
    options: dict[str, Any] = dict(fleet.parameters)
    padded = fleet.preset == "sls" if cell.padded is None else cell.padded
    return run_cluster(
        OpenLoop(jobs(cell)),
        # A rectangle of prompts is one step; continuous batching has vLLM's budget.
        Capabilities(KV_TOKENS, 1, MOST, 10**6 if fleet.preset == "sls" else 2048, KV_TOKENS + 1),
        [Role.MIXED] * cell.instances,
        lambda number: presets.build(fleet.preset, seed=1000 * cell.seed + number, **options),
        profiles.load(PROFILE),
        Dispatcher(dispatch, cost),
        padded=padded,
    )


def measured(cell: Cell) -> dict[str, Any]:
    """The paper's numbers of a cell; times in seconds, tokens per request."""
    done = simulate(cell)
    count = len(done.records)
    assert count == int(cell.rate * SECONDS)
    times = np.array([record.at - record.job.arrival for record in done.records])
    ends = [instance.completed_at for instance in done.instances]
    sizes = [size for instance in done.instances for size in instance.batches]
    sliced = cell.preset in FLEETS
    return {
        "part": cell.part,
        "label": cell.label,
        "preset": cell.preset,
        "lengths": cell.lengths,
        "rate": cell.rate,
        "instances": cell.instances,
        "seed": cell.seed,
        "throughput": count / done.seconds,
        "mean_response": float(times.mean()),
        "p95_response": float(np.percentile(times, 95)),
        "completion_std": float(np.std(ends)),
        "busy_std": float(np.std([instance.busy for instance in done.instances])),
        "batch_size": float(np.mean(sizes)) if sizes else None,
        "slices": float(np.mean(done.slices)),
        "early_return": done.early / done.batches if sliced and done.batches else None,
        "invalid_tokens": sum(i.invalid_tokens for i in done.instances) / count,
        "pad_tokens": sum(i.pad_tokens for i in done.instances) / count,
        "evictions": sum(i.evictions for i in done.instances) / count,
    }


def seeds(cell: Cell, count: int) -> list[Cell]:
    """The same with so many seeds."""
    return [replace(cell, seed=seed) for seed in range(count)]
