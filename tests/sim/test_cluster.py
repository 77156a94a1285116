"""Several simulated instances: nothing is lost, and one instance is what it is by itself."""

from __future__ import annotations

import random
from statistics import pstdev
from typing import Any

import pytest

from penstock.core.dispatcher import Dispatcher
from penstock.core.policies import presets
from penstock.core.policies.fleets import FLEETS, PLACES, build_fleet
from penstock.core.types import Capabilities, FinishReason, Role
from penstock.sim import profiles
from penstock.sim.cluster import run_cluster
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.run import Job, Record, run
from penstock.sim.slicing import cost_of, price
from penstock.sim.sources import ClosedLoop, OpenLoop

LATENCY = profiles.load("llama-2-13b/a100-80g")
PRICED = price(LATENCY)
CAP = 256
MACHINE = Capabilities(
    kv_blocks=8_000, block_size=1, max_batch=64, max_step_tokens=100_000, max_request_tokens=8_001
)


def jobs(count: int, rate: float, seed: int = 1) -> list[Job]:
    source = random.Random(seed)
    at, made = 0.0, []
    for index in range(count):
        at += source.expovariate(rate)
        prompt, output = source.randint(1, 600), source.randint(1, CAP)
        made.append(Job(str(index), at, prompt, output, CAP, request=index))
    return made


def cluster(
    preset: str,
    work: list[Job],
    instances: int = 3,
    place: str | None = None,
    clients: int = 0,
    **parameters: float,
) -> ClusterRun:
    if preset in FLEETS:
        short = {"slice_tokens": 32, "interval": 1.0}
        taken = FLEETS[preset].parameters
        parameters = {k: v for k, v in short.items() if k in taken} | parameters
    fleet = build_fleet(preset, place=place, parameters=parameters)
    cost = cost_of(PRICED.model, slice_tokens=32, safety=0.9, most=64)
    options: dict[str, Any] = dict(fleet.parameters)
    return run_cluster(
        ClosedLoop(work, clients) if clients else OpenLoop(work),
        MACHINE,
        [Role.MIXED] * instances,
        lambda number: presets.build(fleet.preset, seed=number, **options),
        LATENCY,
        Dispatcher(fleet.dispatch, cost if preset in FLEETS else None),
        padded=fleet.preset == "sls",
    )


def check_all_served(done: ClusterRun, work: list[Job]) -> None:
    assert sorted(record.job.id for record in done.records) == sorted(job.id for job in work)
    for record in done.records:
        assert record.ended.output_tokens == record.job.output
        latency = record.latency
        assert latency.ttft is not None
        assert latency.e2e is not None
        assert 0 < latency.ttft <= latency.e2e
        assert record.at == pytest.approx(record.job.arrival + latency.e2e)


@pytest.mark.parametrize("preset", [*presets.PRESETS, *FLEETS])
def test_every_request_gets_all_its_tokens(preset: str) -> None:
    work = jobs(150, rate=12.0)
    done = cluster(preset, work)
    check_all_served(done, work)
    sliced = preset in FLEETS and preset != "scls-kv"
    for record, slices in zip(done.records, done.slices, strict=True):
        if preset != "scls-kv":
            assert slices == (-(-record.job.output // 32) if sliced else 1)
    assert all(instance.memory <= 1 for instance in done.instances)


@pytest.mark.parametrize("place", [name for name in PLACES if name != "max-min"])
def test_every_placement_serves_all(place: str) -> None:
    work = jobs(120, rate=30.0)
    done = cluster("past-future", work, place=place)
    check_all_served(done, work)
    assert min(instance.decode_steps for instance in done.instances) > 0


@pytest.mark.parametrize("preset", ["vllm", "past-future", "sls", "ils"])
@pytest.mark.parametrize("clients", [0, 12])
def test_a_cluster_of_one_is_the_instance_by_itself(preset: str, clients: int) -> None:
    work = jobs(200, rate=20.0)
    source = ClosedLoop(work, clients) if clients else OpenLoop(work)
    fleet = build_fleet(preset)
    alone = run(source, MACHINE, presets.build(preset, seed=0), LATENCY)
    done = run_cluster(
        ClosedLoop(work, clients) if clients else OpenLoop(work),
        MACHINE,
        [Role.MIXED],
        lambda number: presets.build(preset, seed=number),
        LATENCY,
        Dispatcher(fleet.dispatch),
    )
    assert list(map(times, done.records)) == list(map(times, alone.records))
    assert done.instances[0].evictions == alone.evictions
    assert done.seconds == pytest.approx(alone.seconds)


def times(record: Record) -> tuple[str, object, object, object]:
    latency = record.latency
    return (
        record.job.id,
        pytest.approx(latency.ttft),
        pytest.approx(latency.gap),
        pytest.approx(latency.e2e),
    )


def test_a_static_batch_pads_and_waits_for_its_longest() -> None:
    work = [Job("a", 0.0, 100, 10, CAP), Job("b", 0.0, 40, 30, CAP)]
    done = cluster("sls", work, instances=1)
    instance = done.instances[0]
    assert instance.batches == [2]
    assert instance.pad_tokens == 60
    # The first tokens come with the prompts; then a goes on for 20 steps without need.
    assert instance.invalid_tokens == 20
    assert instance.decode_steps == 29
    line = LATENCY.decode_line(2)
    assert line is not None
    decode = sum(line[0] + line[1] * 2 * length for length in range(101, 130))
    first = done.records[0].latency.ttft
    assert first is not None
    assert done.seconds == pytest.approx(first + decode)


def test_a_slice_ends_early_when_all_its_requests_do() -> None:
    work = [Job("a", 0.0, 100, 10, CAP), Job("b", 0.0, 90, 40, CAP)]
    done = cluster("scls", work, instances=1)
    assert (done.batches, done.early) == (2, 1)
    assert done.slices == [1, 2]
    assert all(record.ended.reason is FinishReason.STOP for record in done.records)


def test_offloading_balances_what_round_robin_does_not() -> None:
    def spread(preset: str) -> float:
        runs = [cluster(preset, jobs(300, rate=60.0, seed=seed)).instances for seed in range(4)]
        return sum(pstdev(instance.busy for instance in run) for run in runs)

    assert spread("scls-offload") < spread("scls-batch")


def test_requests_leave_a_crowded_instance_with_what_they_have() -> None:
    # In turn, so that all long ones meet.
    work = [
        Job(str(index), 0.01 * index, 400, 250 if index % 2 else 4, CAP, request=index)
        for index in range(60)
    ]
    kept = cluster("scls-kv", work, instances=2, place="round-robin")
    check_all_served(kept, work)
    assert kept.moves > 0
    assert max(kept.slices) > 1
    still = cluster("past-future", work, instances=2, place="round-robin")
    assert still.moves == 0

    def spread(done: ClusterRun) -> float:
        return pstdev(instance.busy for instance in done.instances)

    assert spread(kept) < spread(still)
    assert kept.seconds < still.seconds


def test_who_moves_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that it is in counts: what the dispatcher was told then is what it takes along."""
    left: list[tuple[int, int]] = []
    ended = Dispatcher.ended

    def watched(self: Dispatcher, slice_id: str, generated: int, *rest: Any, **more: Any) -> Any:
        if FinishReason.CANCELLED in rest:
            left.append((self._slices[slice_id].generated, generated))
        return ended(self, slice_id, generated, *rest, **more)

    monkeypatch.setattr(Dispatcher, "ended", watched)
    work = [
        Job(str(index), 0.01 * index, 400, 250 if index % 2 else 4, CAP, request=index)
        for index in range(60)
    ]
    done = cluster("scls-kv", work, instances=2, place="round-robin")
    assert done.moves == len(left) > 0
    assert all(told <= taken <= told + 1 for told, taken in left), left


def test_requests_that_are_tried_again_do_not_meet_their_own_slices() -> None:
    work = [Job("0", 0.0, 64, 40, CAP, request=0)]
    fleet = build_fleet("scls-slice", parameters={"slice_tokens": 32})
    done = run_cluster(
        ClosedLoop(work, 1, retries=2, met=lambda _: False),
        MACHINE,
        [Role.MIXED],
        lambda _: presets.build(fleet.preset, batch_size=16),
        LATENCY,
        Dispatcher(fleet.dispatch, cost_of(PRICED.model, slice_tokens=32, safety=0.9, most=64)),
        padded=True,
    )
    assert [record.job.id for record in done.records] == ["0", "0+1", "0+2"]
    assert done.slices == [2, 2, 2]


def test_prices_say_how_far_they_are_off() -> None:
    assert 0 < PRICED.slices < 0.2
    assert all(0 < error < 0.3 for error in (*PRICED.train, *PRICED.test))
