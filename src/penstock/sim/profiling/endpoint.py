"""Profile an endpoint: probes to fit, probes to test the fit, and what HTTP adds."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock.bench.client import Target
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.fit import Sample, fit_affine, mape
from penstock.sim.profiling.probes import Probe, Prober
from penstock.sim.profiling.reading import decode_samples, join_samples

_ALONE_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Grid:
    """What is probed.

    Attributes:
        batches: numbers of streams.
        prompts: lengths of the streams' prompts, in tokens.
        joins: lengths of prompts that join them.
        budget: most tokens that the endpoint computes in a step.
        repeats: of each joining prompt.

    Raises:
        ValueError: too few values to fit, or a batch that fills a step alone.
    """

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    joins: tuple[int, ...]
    budget: int
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("batches", "prompts", "joins"):
            values = getattr(self, name)
            if len(set(values)) < 2 or min(values) < 1:
                msg = f"{name} is {values}; it must be two or more different numbers from 1 up"
                raise ValueError(msg)
        if max(self.batches) >= self.budget:
            msg = (
                f"budget is {self.budget}; it must be above the largest of batches "
                f"({max(self.batches)})"
            )
            raise ValueError(msg)

    def fitted(self) -> list[Probe]:
        """Every batch with every prompt length."""
        return [
            Probe(batch, prompt, self.joins, self.repeats)
            for batch in self.batches
            for prompt in self.prompts
        ]

    def held_out(self) -> list[Probe]:
        """Between the values that are fitted."""
        joins = _between(self.joins)
        return [
            Probe(batch, prompt, joins, self.repeats)
            for batch, prompt in zip(
                _between(self.batches), _cycled(_between(self.prompts), self.batches), strict=False
            )
        ]


@dataclass(frozen=True, slots=True)
class Profiled:
    """What came of it.

    Attributes:
        model: step times, host time included.
        fitted, held_out: the samples.
        error, held_out_error: mean absolute relative errors on them.
        edge: seconds that come on top of a lone prompt's steps until its first token: HTTP,
            tokenizing, and the wake-up of an idle engine.
    """

    model: Affine
    fitted: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    error: float
    held_out_error: float
    edge: float


async def profile_endpoint(
    target: Target,
    grid: Grid,
    tokens: tuple[int, int],
    *,
    seed: int = 0,
    on_probe: Callable[[Probe], object] = lambda _: None,
) -> Profiled:
    """Probe an endpoint that serves nobody else.

    Args:
        tokens: prompts are random ids in [low, high).
        on_probe: called after each probe.

    Raises:
        ProbeError: the endpoint fails, or does not do what the probes need.
        ValueError: step times that cannot be fitted.
    """
    async with target.session() as session:
        prober = Prober(session, target, *tokens, seed=seed)
        await prober.alone(grid.joins[0])  # whatever is slow for the first time

        async def samples(probes: Sequence[Probe]) -> list[Sample]:
            found: list[Sample] = []
            for probe in probes:
                seen = await prober.run(probe)
                found += decode_samples(seen) + join_samples(seen, grid.budget)
                on_probe(probe)
            return found

        fitted = await samples(grid.fitted())
        held_out = await samples(grid.held_out())
        model = fit_affine(fitted)
        edges = [
            await prober.alone(length) - _alone(model, length, grid.budget)
            for length in grid.joins
            for _ in range(_ALONE_REPEATS)
        ]
    return Profiled(
        model,
        tuple(fitted),
        tuple(held_out),
        mape(model, fitted),
        mape(model, held_out),
        statistics.median(edges),
    )


def run_profile(
    target: Target,
    grid: Grid,
    tokens: tuple[int, int],
    *,
    seed: int = 0,
    on_probe: Callable[[Probe], object] = lambda _: None,
) -> Profiled:
    """:func:`profile_endpoint` in an event loop of its own."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        job = profile_endpoint(target, grid, tokens, seed=seed, on_probe=on_probe)
        return runner.run(job)


def _alone(model: LatencyModel, tokens: int, budget: int) -> float:
    """Seconds of the steps that compute a prompt while nobody decodes."""
    return sum(
        model.seconds(
            StepLoad(0, 0, prefill=size, prefill_work=size * (start + size / 2), chunks=1)
        )
        for start in range(0, tokens, budget)
        for size in [min(budget, tokens - start)]
    )


def _between(values: Sequence[int]) -> tuple[int, ...]:
    """Geometric means of neighbours."""
    ordered = sorted(set(values))
    return tuple(round((a * b) ** 0.5) for a, b in pairwise(ordered))


def _cycled(values: Sequence[int], like: Sequence[object]) -> list[int]:
    return [values[i % len(values)] for i in range(len(like))]
