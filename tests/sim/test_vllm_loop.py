"""The production scheduler with preset vllm decides as vLLM's own loop does, written down anew."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.forecast.latency.roofline import Roofline
from penstock.core.policies import presets
from penstock.core.types import Capabilities
from penstock.sim.run import Job, run
from penstock.sim.sources import OpenLoop
from tests.sim.vllm_loop import Loop

MODEL = Roofline(0.002, 0.01, 0.004, 6e-5, 1e-5, 2e-7, 2e-9)


def jobs_of(seed: int, count: int, rate: float) -> list[Job]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    prompts = np.minimum(rng.lognormal(5.5, 1.0, count).astype(int) + 1, 3000)
    outputs = np.minimum(rng.lognormal(5.0, 0.8, count).astype(int) + 2, 1500)
    triples = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Job(str(i), *triple, cap=1500, request=i) for i, triple in enumerate(triples)]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("kv_tokens", "places"), [(200_000, 32), (24_000, 256), (12_000, 256)])
def test_same_tokens_at_the_same_times(seed: int, kv_tokens: int, places: int) -> None:
    jobs = jobs_of(seed, 200, rate=12)
    loop = Loop(kv_tokens // 16, 16, places, 2048)
    wanted = loop.run(jobs, MODEL)
    machine = Capabilities(kv_tokens // 16, 16, places, 2048, kv_tokens)
    done = run(OpenLoop(jobs), machine, presets.build("vllm", watermark=1.0), MODEL)
    assert done.evictions == loop.preemptions
    assert (loop.preemptions > 20) == (places == 256)
    for record in done.records:
        stamps, latency = wanted[record.job.id], record.latency
        assert latency.ttft == pytest.approx(stamps[0] - record.job.arrival)
        assert latency.e2e == pytest.approx(stamps[-1] - record.job.arrival)
