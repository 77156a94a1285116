"""A simulated run is summed up by the load generator's own definitions."""

from __future__ import annotations

import pytest

from penstock.core.forecast.latency.affine import Affine
from penstock.core.policies import presets
from penstock.core.types import SLO, Capabilities
from penstock.sim.outcome import attempt_of, summary_of
from penstock.sim.run import Job, run
from penstock.sim.sources import OpenLoop

MACHINE = Capabilities(
    kv_blocks=100, block_size=1, max_batch=4, max_step_tokens=50, max_request_tokens=60
)


def test_latencies_count_from_arrival_and_goodput_counts_only_promises_kept() -> None:
    second = Affine(step=1.0, token=0, work=0, request=0, context=0)
    jobs = [
        Job("a", 0.5, 10, 4, 9, slo=SLO(ttft=1.2, gap=1.0), request=0),
        Job("b", 0.5, 10, 3, 9, slo=SLO(ttft=0.9), request=1, attempt=1),
    ]
    done = run(OpenLoop(jobs), MACHINE, presets.build("vllm"), second)
    by_id = {record.job.id: attempt_of(record) for record in done.records}
    a, b = by_id["a"], by_id["b"]
    assert (a.latency.ttft, a.latency.tpot, a.latency.gap, a.latency.e2e) == (1.0, 1.0, 1.0, 4.0)
    assert a.met
    assert b.broken == ("ttft",)
    assert b.number == 1
    summary = summary_of(done)
    assert summary.attainment == 0.5
    assert summary.goodput_output_tps == pytest.approx(4 / 4.5)
    assert summary.throughput_output_tps == pytest.approx(7 / 4.5)
