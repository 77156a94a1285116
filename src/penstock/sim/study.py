"""The behaviour study of the Past-Future paper: steps without times, and what it counts.

Problem: how a policy uses memory, and whom it evicts, is a matter of steps; a study that counts
steps compares policies without any machine.

Source: Past-Future (arXiv 2507.10150) and the simulator in its authors' artifact.  From the latter:
all requests wait from the start; the history of past lengths begins with half a window of 512;
outputs may exceed the cap that policies are told; numbers are taken until nobody waits any more.

Limits: the last batch, after nobody waits, says nothing about admission and is not counted, so
``decode_steps`` is less than the steps until all have finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.core.forecast.occupancy import peak
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.snapshot import Ints
from penstock.sim.run import Run

COLD_START = 512
"""Output length that the artifact's simulator assumes before anything has ended."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the study counts, until nobody waits any more.

    Attributes:
        decode_steps: steps in which someone decoded.
        memory: mean share of the KV memory in use over those.
        peak: mean true future peak over those, as a share of the capacity: the memory that the
            running requests would need at most if each ran to its true end and nobody joined.
    """

    decode_steps: int
    memory: float
    peak: float


def study_policy(preset: str, *, seed: int, period: int | None = None, **parameters: Any) -> Policy:
    """A preset as the study has it: with the artifact's cold start, unless one is given.

    Raises:
        ValueError: see :func:`penstock.core.policies.presets.build`.
    """
    known = presets.PRESETS.get(preset)
    if known is not None and "cold_start" in known.parameters:
        parameters.setdefault("cold_start", COLD_START)
    return presets.build(preset, seed=seed, period=period, **parameters)


def behaviour(run: Run, kv_tokens: int) -> Behaviour:
    """Take the study's numbers of a run whose steps are the unit of time."""
    spans = _spans(run)
    if not len(spans):
        return Behaviour(0, 0.0, 0.0)
    # Where nobody ever waits, all of the run counts.
    steps = int(spans[:, 0].max()) - 1 or int(spans[:, 1].max())
    first, last, tokens, left = spans[spans[:, 0] <= steps].T
    count = np.minimum(last, steps) - first + 1
    held = int((count * tokens + count * (count - 1) // 2).sum())
    moments = np.unique(np.concatenate(([1], first, last + 1, [steps + 1])))
    moments = moments[moments <= steps + 1]
    peaks = _peaks(first, last, tokens, left, moments)
    whole = steps * kv_tokens
    return Behaviour(steps, held / whole, float(peaks @ np.diff(moments)) / whole)


def _spans(run: Run) -> Ints:
    """Uninterrupted decoding as rows (first tick, last tick, KV tokens in the first, steps left).

    Steps left are those after the first until the request's true end.
    """
    rows = []
    for record in run.records:
        job, generated = record.job, 0
        for stretch in record.track.stretches:
            generated += stretch.sampled_at is not None
            count = stretch.last - stretch.first + 1
            if count > 0:
                left = job.output - generated - 1
                rows.append((stretch.first, stretch.last, job.prompt + generated, left))
                generated += count
    return np.array(rows, dtype=np.int64)


def _peaks(first: Ints, last: Ints, tokens: Ints, left: Ints, moments: Ints) -> Ints:
    """The true future peak at each moment but the last; it is constant between two of them."""
    order = np.argsort(first, kind="stable")
    bounds = np.searchsorted(first[order], moments, side="right").tolist()
    running: list[int] = []
    peaks = np.zeros(len(moments) - 1, dtype=np.int64)
    joined = 0
    for i, moment in enumerate(moments[:-1].tolist()):
        running = [row for row in running if last[row] >= moment]
        running.extend(order[joined : bounds[i]].tolist())
        joined = bounds[i]
        if running:
            rows = np.array(running)
            past = moment - first[rows]
            peaks[i] = peak(tokens[rows] + past, left[rows] - past)
    return peaks
