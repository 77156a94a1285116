"""Prefill and decode instances, simulated: by hand, and whatever the load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cli import app
from penstock.core.forecast.latency.affine import Affine
from penstock.core.policies import presets
from penstock.core.types import SLO, Capabilities
from penstock.sim.cluster_run import ClusterRun
from penstock.sim.fleet import Disaggregated, simulate_fleet
from penstock.sim.link import Link, Transfers
from penstock.sim.run import Job
from penstock.sim.sources import OpenLoop

# A step of 10 ms, 1 ms per prompt token; contexts cost nothing.
FLAT = Affine(step=0.01, token=0.001, work=0.0, request=0.0, context=0.0)
MACHINE = Capabilities(
    kv_blocks=2_000, block_size=1, max_batch=8, max_step_tokens=64, max_request_tokens=400
)
KAIROS = ("distserve", "kairos-literal", "kairos")


def disaggregated(
    jobs: list[Job],
    preset: str = "distserve",
    *,
    prefill: int = 1,
    decode: int = 1,
    link: Link | None = None,
    back_pressure: float | None = None,
    stream: bool = False,
) -> ClusterRun:
    machines = Disaggregated(prefill, decode, link, back_pressure, stream)
    return simulate_fleet(preset, OpenLoop(jobs), MACHINE, machines, FLAT, parameters={}, cap=200)


def test_one_request_by_hand() -> None:
    """40 tokens of prompt, then 4 steps: the second token comes with the KV on the other side."""
    done = disaggregated([Job("r", 1.0, 40, 5, 200)], link=Link(100, 1000.0, 0.5))
    (record,) = done.records
    latency = record.latency
    assert latency.ttft == pytest.approx(0.05)
    # The hand-off of 40 tokens takes 0.5 + 40 * 100 / 1000 seconds.
    assert record.at == pytest.approx(1.05 + 4.5 + 4 * 0.01)
    assert latency.gap == pytest.approx(4.51)
    assert latency.tpot == pytest.approx(4.54 / 4)
    assert record.ended.output_tokens == 5
    transfers = done.summary()["transfers"]
    assert transfers == {
        "hand_offs": 1, "bytes": 4000, "seconds": 4.5, "waited_s": 0.0,
        "bandwidth": pytest.approx(4000 / 4.5),
    }  # fmt: skip


def test_kv_that_goes_ahead_by_hand() -> None:
    """150 tokens of prompt in steps of 64, 64 and 22: only the last 22 cross after the prefill."""
    job, link = Job("r", 0.0, 150, 5, 200), Link(100, 100_000.0, 0.02)
    at_once = disaggregated([job], link=link).records[0]
    ahead = disaggregated([job], link=link, stream=True)
    assert at_once.latency.ttft == ahead.records[0].latency.ttft == pytest.approx(0.18)
    assert at_once.at == pytest.approx(0.18 + 0.02 + 0.15 + 0.04)
    # Parts of 64 tokens take 0.084 seconds each, from 0.074 on; the last one waits for them.
    there = 0.074 + 2 * 0.084 + 0.02 + 0.022
    assert ahead.records[0].at == pytest.approx(there + 0.04)
    transfers = ahead.summary()["transfers"]
    assert (transfers["hand_offs"], transfers["bytes"]) == (1, 15_000)


def test_a_request_of_one_token_is_not_handed_over() -> None:
    done = disaggregated([Job("r", 0.0, 40, 1, 200)])
    assert done.records[0].at == pytest.approx(0.05)
    assert done.transfers is not None
    assert done.transfers.count == 0


def test_transfers_into_an_instance_queue() -> None:
    transfers = Transfers(Link(10, 100.0, 1.0))
    assert transfers.begin(1, 10, 5.0) == 7.0
    assert transfers.begin(1, 20, 5.5) == 10.0
    assert transfers.begin(2, 20, 5.5) == 8.5
    assert transfers.waited == 1.5
    assert transfers.busy == 8.0


@pytest.mark.parametrize("preset", [*KAIROS, "past-future", "vllm"])
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 2), st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=25
    ),
    machines=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bandwidth=st.sampled_from([50.0, 1e4, math.inf]),
    back_pressure=st.sampled_from([None, 0.3, 1.0]),
    stream=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_everyone_is_served_whatever_comes(
    preset: str,
    rows: list[tuple[float, int, int]],
    machines: tuple[int, int],
    bandwidth: float,
    back_pressure: float | None,
    *,
    stream: bool,
) -> None:
    slo = SLO(ttft=0.2, tpot=0.02)
    jobs = [
        Job(str(index), at, prompt, output, 200, slo)
        for index, (at, prompt, output) in enumerate(sorted(rows))
    ]
    prefill, decode = machines
    done = disaggregated(
        jobs, preset, prefill=prefill, decode=decode, link=Link(1, bandwidth, 0.001),
        back_pressure=back_pressure, stream=stream,
    )  # fmt: skip
    assert {record.job.id for record in done.records} == {job.id for job in jobs}
    for record in done.records:
        latency = record.latency
        assert record.ended.output_tokens == record.job.output
        assert latency.ttft is not None
        assert latency.ttft >= 0.01 - 1e-9
        assert record.at == pytest.approx(record.job.arrival + (latency.e2e or 0.0))
        if record.job.output > 1:
            assert latency.gap is not None
            assert latency.tpot is not None
            assert latency.gap >= latency.tpot - 1e-9
    assert done.transfers is not None
    assert done.transfers.count == sum(job.output > 1 for job in jobs)
    assert done.summary()["utilization"].keys() == {"prefill", "decode"}  # type: ignore[attr-defined]


def test_prefill_waits_where_decode_has_no_room() -> None:
    jobs = [Job(str(i), 0.0, 150, 150, 200) for i in range(60)]
    ahead = disaggregated(jobs).records
    held = disaggregated(jobs, back_pressure=1.0).records

    def last_first(records: list) -> float:  # type: ignore[type-arg]
        return max(record.latency.ttft for record in records)

    def longest_gap(records: list) -> float:  # type: ignore[type-arg]
        return max(record.latency.gap for record in records)

    assert last_first(held) > 1.5 * last_first(ahead)
    assert longest_gap(held) < 0.5 * longest_gap(ahead)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "simulate", "--preset", ",".join(KAIROS), "--requests", "40", "--rate", "4",
        "--input", "lognormal:2000,1.0,20000", "--output", "20-200", "--kv-tokens", "400000",
        "--profile", "llama-3.1-8b/h100", "--slo", "ttft=8,tpot=0.05",
    ]  # fmt: skip
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as caught:
        app([*words, "--prefill", "1", "--decode", "2", "--json", str(out)])
    assert caught.value.code == 0
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [run["preset"] for run in runs] == list(KAIROS)
    for run in runs:
        assert run["finished"] == 40
        assert run["cluster"]["transfers"]["hand_offs"] == 40
        assert run["cluster"]["instances"] == 3
    for wrong, said in (
        (["--prefill", "1"], "prefill is 1 and decode is 0"),
        (["--decode", "2"], "prefill is 0 and decode is 2"),
        (["--prefill", "1", "--decode", "1", "--instances", "2"], "instances is 2"),
        (["--back-pressure", "1"], "back_pressure is 1"),
        (["--prefill", "1", "--decode", "1", "--link-bandwidth", "0"], "bandwidth is 0"),
        (["--prefill", "1", "--decode", "1", "--back-pressure", "0"], "back_pressure is 0"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*words, *wrong])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_roles_do_not_go_with_slices() -> None:
    assert "scls" not in presets.PRESETS
    with pytest.raises(SystemExit) as caught:
        app(
            "simulate --preset scls --input 10-20 --output 10-20 --kv-tokens 1000 "
            "--profile llama-3.1-8b/h100 --prefill 1 --decode 1"
        )
    assert caught.value.code == 2
