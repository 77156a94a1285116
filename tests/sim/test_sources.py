"""Clients who try again."""

from __future__ import annotations

import pytest

from penstock.core.forecast.latency.affine import DecodeSteps
from penstock.core.policies import presets
from penstock.core.types import SLO, Capabilities, OnMiss
from penstock.sim.run import Job, Record, run
from penstock.sim.sources import ClosedLoop, OpenLoop

MACHINE = Capabilities(
    kv_blocks=30, block_size=1, max_batch=4, max_step_tokens=30, max_request_tokens=30
)


def go(source: ClosedLoop) -> list[Record]:
    return run(source, MACHINE, presets.build("tgi"), DecodeSteps()).records


def test_who_was_too_late_goes_to_the_end_of_the_list_and_keeps_its_number() -> None:
    """Memory is for one: b waits for a's end, and is given up; c comes before b's second try."""
    slo = SLO(ttft=5)
    jobs = [
        Job(name, 0.0, 10, 9, 12, slo, on_miss=OnMiss.EXPIRE, request=i)
        for i, name in enumerate("abc")
    ]
    records = go(ClosedLoop(jobs, 2, retries=3))
    tries = sorted((r.job.request, r.job.attempt) for r in records)
    assert [r.job.id for r in records][:2] == ["b", "a"]
    assert len({r.job.id for r in records}) == len(records)
    assert tries == sorted(set(tries))
    last = {r.job.request: r for r in records}
    assert all(r.latency.ttft is not None for r in last.values())
    again = next(r for r in records if r.job.id == "b+1")
    third = next(r for r in records if r.job.id == "c")
    assert third.job.arrival <= again.job.arrival
    assert again.job.arrival > 0


def test_tries_are_counted_and_end() -> None:
    jobs = [Job("a", 0.0, 10, 9, 12, SLO(e2e=1))]
    assert [r.job.id for r in go(ClosedLoop(jobs, 1, retries=2))] == ["a", "a+1", "a+2"]
    assert [r.job.id for r in go(ClosedLoop(jobs, 1))] == ["a"]


def test_a_judge_of_ones_own_and_an_end_in_time() -> None:
    jobs = [Job("a", 0.0, 10, 9, 12)]
    never = go(ClosedLoop(jobs, 1, retries=10**6, met=lambda _: False, until=20))
    assert [r.job.arrival for r in never] == [0, 8, 16]


@pytest.mark.parametrize("arrival", [float("nan"), float("inf")])
def test_an_arrival_that_never_comes_is_refused(arrival: float) -> None:
    with pytest.raises(ValueError, match=rf"job b arrives at {arrival}; it must be a number of"):
        OpenLoop([Job("a", 0.0, 10, 9, 12), Job("b", arrival, 10, 9, 12)])


def test_negative_retries_are_refused() -> None:
    with pytest.raises(ValueError, match="retries is -1"):
        ClosedLoop([], 1, retries=-1)
