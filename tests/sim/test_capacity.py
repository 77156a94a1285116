"""A capacity is where attainment crosses the target, seed by seed, and says how sure it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cyclopts
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sim.capacity import Search, answer, capacities, largest
from penstock.sim.capacity_command import capacity_command
from penstock.sim.execute import one_run
from penstock.sim.interval import interval
from penstock.sim.spec import RunSpec

app = cyclopts.App(name="penstock", result_action="return_value")
app.command(capacity_command, name="capacity")
WORDS = (
    "--input 8-40 --output 4-20 --requests 80 --kv-tokens 600 --max-batch 16 --steps-only "
    "--slo ttft=20,gap=3"
)
VLLM = f"{WORDS} --preset vllm"
SPEC = RunSpec(
    preset="vllm", input="uniform:8-40", output="uniform:4-20", requests=80, rate=1.0,
    kv_tokens=600, max_batch=16, steps_only=True, slo=("ttft=20,gap=3",),
)  # fmt: skip


def search(**changes: object) -> Search:
    usual = {"find": "rate", "attainment": 0.9, "low": 0.01, "high": 100.0, "start": 1.0}
    return Search(**{**usual, **changes})


def penstock(words: str) -> int:
    return app(["capacity", *words.split()], exit_on_error=False)


def found_by(words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, object]:
    assert penstock(f"{words} --json -") == code
    out = capsys.readouterr()
    assert out.err == ""
    return json.loads(out.out)


@given(edge=st.floats(0.02, 90), start=st.floats(0.001, 1000), tolerance=st.floats(0.001, 0.5))
def test_the_edge_is_found_to_the_tolerance(edge: float, start: float, tolerance: float) -> None:
    asked = search(start=start, tolerance=tolerance)
    good, bad = largest(lambda value: value <= edge, asked)
    assert good <= edge < bad
    assert bad - good <= tolerance * good


@pytest.mark.parametrize("edge", [0.02, 1.0, 3.7, 90.0])
def test_no_search_goes_on_between_neighbouring_numbers(edge: float) -> None:
    good, bad = largest(lambda value: value <= edge, search(tolerance=1e-18))
    assert good <= edge < bad
    assert bad == math.nextafter(good, math.inf)


@given(edge=st.integers(1, 299), start=st.integers(1, 300))
def test_whole_numbers_end_next_to_each_other(edge: int, start: int) -> None:
    asked = search(find="clients", low=1, high=300, start=start, tolerance=0.001)
    tried: list[float] = []

    def holds(value: float) -> bool:
        tried.append(value)
        return value <= edge

    assert largest(holds, asked) == (edge, edge + 1)
    assert all(float(value).is_integer() for value in tried)
    assert len(tried) == len(set(tried)) <= 20


def test_a_bound_is_not_an_edge() -> None:
    assert largest(lambda value: True, search()) == (100.0, None)  # noqa: ARG005
    assert largest(lambda value: False, search()) == (None, 0.01)  # noqa: ARG005


def test_an_answer_is_where_attainment_crosses_the_target() -> None:
    found = answer(SPEC, search())
    assert found.sustained is not None
    assert found.missed is not None
    for value, sustained in ((found.sustained, True), (found.missed, False)):
        result = one_run(msgspec.structs.replace(SPEC, rate=value))
        assert (result.attainment >= 0.9) is sustained
        assert found.at(value).attainment == result.attainment
    assert found.missed / found.sustained <= 1.02


def test_the_rate_is_that_of_the_arrivals_whatever_the_speed() -> None:
    usual = answer(SPEC, search())
    assert answer(msgspec.structs.replace(SPEC, speed=4.0), search()) == usual


def test_a_search_begins_at_the_load_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    data = found_by(f"{VLLM} --rate 0.5 --speed 2 --seeds 1 --attainment 0.9", capsys)
    assert data["search"]["start"] == 1
    assert data["capacities"][0]["answers"][0]["tried"][0]["value"] == 1


def test_presets_with_slices_have_a_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--preset scls,past-future --instances 2 --input 10-100 --output 5-50 --requests 300 "
        "--cap 200 --kv-tokens 2000 --max-batch 16 --profile llama-2-7b/a100-80g --slo e2e=2 "
        "--attainment 0.5"
    )
    data = found_by(f"{words} --seeds 1 --tolerance 0.5", capsys)
    slices, whole = data["capacities"]
    assert (slices["policy"], whole["policy"]) == ("scls", "past-future")
    assert 0 < slices["mean"][0] < whole["mean"][0]


def test_the_interval_is_over_seeds_and_holds_the_resolution() -> None:
    (one,) = capacities([SPEC], search(), range(4), 1)
    sustained = [a.sustained for a in one.answers]
    assert [a.seed for a in one.answers] == [0, 1, 2, 3]
    assert one.mean.mean == interval(sustained).mean
    assert one.mean.low == min(
        interval(sustained).low, interval([a.missed for a in one.answers]).low
    )
    assert one.mean.high == interval([a.missed for a in one.answers]).high
    assert one.safe == min(sustained)
    assert one.attainment >= 0.9
    assert capacities([SPEC], search(), range(4), 2) == [one]


def test_presets_are_compared_seed_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{WORDS} --preset tgi,oracle,tgi --attainment 0.9 --seeds 3"
    data = found_by(words, capsys)
    tgi, oracle = data["capacities"]  # named twice is searched once
    assert data["unit"] == "req/s"
    assert tgi["to_first"] is None
    ratios = [
        a["sustained"] / b["sustained"]
        for a, b in zip(oracle["answers"], tgi["answers"], strict=True)
    ]
    assert min(ratios) <= oracle["to_first"][0] <= max(ratios)
    assert oracle["to_first"][0] > 1
    assert any("raise --requests" in note for note in tgi["notes"])


def test_clients_and_instances(capsys: pytest.CaptureFixture[str]) -> None:
    clients = found_by(f"{WORDS} --clients 4 --attainment 0.9 --seeds 2", capsys)
    assert clients["unit"] == "clients"
    for one in clients["capacities"][0]["answers"]:
        assert one["missed"] == one["sustained"] + 1

    rate = found_by(f"{WORDS} --attainment 0.9 --seeds 2", capsys)["capacities"][0]["mean"][0]
    words = f"{WORDS} --rate {3 * rate} --find instances --attainment 0.9 --seeds 2"
    data = found_by(words, capsys)
    assert data["unit"] == "instances"
    (one,) = data["capacities"]
    assert all(a["missed"] == a["sustained"] - 1 for a in one["answers"])
    assert one["safe"] == max(a["sustained"] for a in one["answers"])
    assert 2 <= one["mean"][0] <= 6

    easy = found_by(f"{WORDS} --rate 0.01 --find instances --seeds 2", capsys)["capacities"][0]
    assert easy["mean"] == [1, 1, 1]
    assert easy["notes"] == []


def test_a_search_that_ends_at_a_bound_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    data = found_by(f"{VLLM} --between 0.01:0.02 --seeds 2", capsys, code=1)
    (one,) = data["capacities"]
    assert one["mean"] is None
    assert one["safe"] == 0.02
    assert "the bound of 0.02 too (seeds 0, 1)" in one["notes"][0]
    data = found_by(f"{VLLM} --between 50:90 --seeds 2", capsys, code=1)
    (one,) = data["capacities"]
    assert one["mean"] is one["safe"] is None
    assert "not even 50 req/s" in one["notes"][0]
    few = found_by(f"{VLLM} --rate 50 --find instances --between 1:2 --seeds 1", capsys, code=1)[
        "capacities"
    ][0]
    assert "not even 2 instances" in few["notes"][0]
    assert "one seed says nothing" in few["notes"][1]


def test_a_trace_at_its_own_times_is_one_sample_of_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    rows = "".join(f"{5 * i},{20 + i % 7},{5 + i % 5}\n" for i in range(60))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}", encoding="utf-8")
    words = f"--trace {trace} --kv-tokens 400 --max-batch 8 --steps-only --slo ttft=20,gap=3"
    data = found_by(f"{words} --arrivals trace --seeds 2", capsys)
    assert data["unit"] == "x trace speed"
    assert "the trace's own times" in data["capacities"][0]["notes"][0]


def test_the_table_has_the_numbers_and_the_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert penstock(f"{WORDS} --preset tgi,vllm --attainment 0.9 --seeds 2") == 0
    out = capsys.readouterr().out
    assert "largest load, req/s, with 90.0% of the requests" in out
    assert "tgi: runs lasted" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS.replace("--slo ttft=20,gap=3", ""), "--slo is needed"),
        (f"{WORDS} --attainment 99", "attainment is 99"),
        (f"{WORDS} --between 5:1", "it must be LOW:HIGH"),
        (f"{WORDS} --between five", "write LOW:HIGH"),
        (f"{WORDS} --between 0.5:2 --find instances --rate 1", "instances are whole numbers"),
        (f"{WORDS} --tolerance 0", "tolerance is 0"),
        (f"{WORDS} --seeds 0", "seeds is 0"),
        (f"{WORDS} --preset best", "preset 'best' is unknown"),
        (f"{WORDS} --rate 1 --clients 2", "give --clients for a closed loop"),
        (f"{WORDS} --rate 1 --find speed", "leave --rate and --clients out"),
        (f"{WORDS} --output 4-9000", "can never fit"),
        (f"{WORDS} --rate 0", "rate is 0.0; it must be a finite number above 0"),
        (f"{WORDS} --clients 0", "clients is 0; it must be at least 1"),
        (f"{WORDS} --preset scls", "preset scls with place None needs a profile"),
    ],
)
def test_what_is_wrong_is_named(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert penstock(words.replace("--output 4-20", "") if "9000" in words else words) == 2
    assert message in capsys.readouterr().err
