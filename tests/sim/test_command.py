"""``penstock simulate``: its flags and keys are a contract for other tools."""

from __future__ import annotations

import json
from pathlib import Path

import cyclopts
import pytest

from penstock.core.policies.fleets import FLEETS
from penstock.core.policies.presets import PRESETS
from penstock.sim.command import simulate
from penstock.sim.execute import check_spec
from penstock.sim.simulation import simulation_of
from penstock.sim.spec import RunSpec, workload_of

app = cyclopts.App(name="penstock", result_action="return_value")
app.command(simulate)
TIMED = (
    "--input 32-409 --output 20-300 --requests 40 --rate 20 --profile llama-2-7b/a100-80g "
    "--kv-tokens 9000"
)
STUDY = "--kv-tokens 9000 --plan-every 10 --prefill-budget 3000 --steps-only --seed 1"


def penstock(words: str) -> int:
    return app(["simulate", *words.split()], exit_on_error=False)


def runs_of(words: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert penstock(f"{words} --json -") == 0
    out = capsys.readouterr()
    assert out.err == ""
    return json.loads(out.out)["runs"]


def test_the_study_prints_one_json_object_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = "--requests 80 --input 32-409 --output 204-500 --cap 409"
    runs = runs_of(f"--preset past-future,vllm,tgi,oracle {load} {STUDY}", capsys)
    assert [run["preset"] for run in runs] == ["past-future", "vllm", "tgi", "oracle"]
    for run in runs:
        assert run["seed"] == 1
        assert run["finished"] == 80
        assert 0 < run["memory_utilization"] <= 1
        assert run["memory_utilization"] <= run["peak_memory"]
        assert run["evicted_ratio"] == run["evictions"] / 80
        assert 0 < run["decode_steps"] < run["all_decode_steps"]
        assert run["wall_s"] > 0
    by_name = {run["preset"]: run for run in runs}
    assert by_name["oracle"]["evictions"] == by_name["tgi"]["evictions"] == 0
    assert by_name["tgi"]["memory_utilization"] < by_name["oracle"]["memory_utilization"]
    assert by_name["vllm"]["evictions"] > by_name["past-future"]["evictions"]


def test_same_seed_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--requests 40 --input 32-409 --output 204-409 {STUDY}"
    first, again = runs_of(words, capsys), runs_of(words, capsys)
    other = runs_of(words.replace("--seed 1", "--seed 2"), capsys)
    for (run,) in (first, again, other):
        run.pop("wall_s")
    assert first == again
    assert other[0]["decode_steps"] != first[0]["decode_steps"]


def test_parameters_go_to_the_presets_that_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--requests 40 --input 32-409 --output 204-409 {STUDY} --preset past-future,vllm"
    usual = runs_of(words, capsys)
    changed = runs_of(f"{words} --parameters.reserve 0.3 --cold-start 409", capsys)
    assert changed[0]["parameters"] == {"reserve": 0.3, "cold_start": 409}
    assert changed[0]["decode_steps"] > usual[0]["decode_steps"]
    assert changed[1]["parameters"] == {}
    assert changed[1]["decode_steps"] == usual[1]["decode_steps"]


def test_without_json_there_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.json"
    assert penstock(f"--requests 20 --input 50 --output 20 {STUDY} --json {target}") == 0
    assert "past-future" in capsys.readouterr().out
    assert json.loads(target.read_text())["runs"][0]["finished"] == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps-only --input 5", "--kv-tokens is needed"),
        ("--kv-tokens 100 --input 5", "give --profile"),
        (f"{STUDY} --preset vllm --parameters.window 40", "none of the presets vllm has it"),
        (f"{STUDY} --preset best --input 5", "preset 'best' is unknown"),
        (f"{STUDY} --input 5-x", "'5-x' is not understood"),
        (
            f"{STUDY} --input 5 --cap 9100",
            "request 0 (counted from 0), prompt tokens is 5; with a cap",
        ),
        (f"{STUDY} --trace nowhere.csv", "nowhere.csv"),
        (
            f"{STUDY} --input 5 --rate 3 --retries 2",
            "retries is 2; it must be at least 0, and 0 in",
        ),
        (f"{STUDY} --preset scls", "preset scls with place None needs a profile"),
        (f"{TIMED} --place nowhere", "place 'nowhere' is unknown; known are: round-robin"),
        (f"{TIMED} --place max-min", "place 'max-min' needs a preset with slices"),
        (f"{TIMED} --padded", "padded is for static batches"),
        (f"{TIMED} --preset scls --parameters.slice_tokens 0", "slice_tokens is 0"),
        (
            f"{TIMED} --cap 300 --preset scls --parameters.slice_tokens 301",
            "slice_tokens is 301; it must be at most the cap of 300",
        ),
        (f"{TIMED} --instances 2 --clients 3", "without a place, several need an open loop"),
        (f"{TIMED} --place round-robin --html x.html", "cannot be watched step by step"),
        (f"{TIMED} --preset scls --html x.html", "preset scls with place None cannot be watched"),
        (f"{TIMED} --preset best", "sls, ils, distserve, kairos-literal, kairos, scls-slice,"),
        (f"{TIMED} --seed -1", "seed is -1; it must be at least 0"),
        (f"{TIMED} --block-size 9001", "block_size is 9001; it must be at most kv_tokens (9000)"),
        (
            f"{TIMED} --max-batch 65 --prefill-budget 64",
            "max_batch is 65; it must be at most prefill_budget (64)",
        ),
    ],
)
def test_what_is_wrong_is_named(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert penstock(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset vllm,scls --html {page}", "preset scls with place None cannot be watched"),
        ("--preset vllm,scls --chrome-trace {page}", "cannot be watched step by step"),
        (
            "--cap 300 --preset vllm,scls --parameters.slice_tokens 301",
            "slice_tokens is 301; it must be at most the cap of 300",
        ),
        ("--preset vllm,past-future --parameters.reserve 2", "reserve is 2"),
        ("--preset vllm,best", "preset 'best' is unknown"),
    ],
)
def test_what_one_preset_refuses_is_said_before_any_runs(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []

    def simulation_of(spec: RunSpec, *_: object, **__: object) -> None:
        ran.append(spec.preset)

    monkeypatch.setattr("penstock.sim.command.simulation_of", simulation_of)
    assert penstock(f"{TIMED} {words.format(page=tmp_path / 'page')}") == 2
    assert message in capsys.readouterr().err
    assert ran == []


@pytest.mark.parametrize("preset", [*PRESETS, *FLEETS])
@pytest.mark.parametrize("place", [None, "round-robin"])
def test_what_is_checked_runs_too(preset: str, place: str | None) -> None:
    """Checking builds everything, and nothing in it waits for a request that does not come."""
    spec = RunSpec(
        preset=preset,
        place=place,
        kv_tokens=9000,
        profile="llama-2-7b/a100-80g",
        input="uniform:32-409",
        output="uniform:100-200",
        requests=5,
        rate=20,
    )
    workload = workload_of(spec)
    check_spec(spec, workload)
    assert simulation_of(spec, workload).summary.finished == 5


def test_instances_behind_a_dispatcher(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{TIMED} --preset sls,ils,scls --instances 3 --place round-robin --json -"
    assert penstock(words) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["finished"] for run in runs] == [40, 40, 40]
    slices = [run["cluster"]["slices"] for run in runs]
    assert slices[:2] == [1.0, 1.0]
    assert slices[2] > 1
    assert penstock(f"{TIMED} --preset scls --instances 3 --padded --json -") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["cluster"]["pad_tokens"] > 0
    assert run["cluster"]["instances"] == 3
    closed = TIMED.replace("--rate 20", "--clients 5")
    assert penstock(f"{closed} --preset vllm --instances 2 --place forecast-aware") == 0


def test_clients_try_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--requests 40 --input 32-409 --output 204-409 {STUDY} --clients 40 --slo ttft=300"
    (once,), (more,) = runs_of(words, capsys), runs_of(f"{words} --retries 2", capsys)
    assert once["attempts"] == 40 < more["attempts"] <= 120


def test_a_request_that_is_tried_again_finishes_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--requests 40 --input 32-409 --output 204-409 {STUDY} --clients 40 --slo ttft=300"
    (run,) = runs_of(f"{words} --preset vllm --retries 2", capsys)
    assert run["ends"]["completed"] == run["attempts"] > 40
    assert run["finished"] == 40
    assert run["evictions"] > 0
    assert run["evicted_ratio"] == run["evictions"] / 40


@pytest.mark.parametrize("output", ["1", "1-2"])
def test_requests_that_end_at_once_are_counted(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prefill takes no time, so the first token of the first batch comes at 0."""
    page = tmp_path / "r.html"
    words = f"--steps-only --kv-tokens 1000 --requests 40 --input 10 --output {output}"
    (run,) = runs_of(f"{words} --html {page}", capsys)
    assert run["finished"] == run["attempts"] == 40
    assert page.exists()


HEAD = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize("how", ["--arrivals trace", "--rate 3", "--clients 2", ""])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt_tokens\n0,3\n", "line 1 has the columns arrival_s, prompt_tokens"),
        (f"{HEAD}0,-3,4\n", "row 1 (line 2), column 'prompt_tokens' is '-3'"),
        (
            f"{HEAD}5,3,4\n2,3,4\n",
            "rows are not in order of time: row 2 (line 3), column 'arrival_s', is before the row",
        ),
        (
            f"{HEAD}0,3,4\n1,9999,4\n",
            "row 2 (line 3), column 'prompt_tokens' is 9999; it can never fit kv_tokens (9000)",
        ),
        (
            f"{HEAD}0,3,4\n1,9,8993\n",
            "row 2 (line 3), column 'output_tokens' is 8993; with its prompt of 9 tokens it can",
        ),
        (
            f"{HEAD}0,8000,4\n1,9,2000\n",
            "row 1 (line 2), column 'prompt_tokens' is 8000; with a cap of 2000 tokens",
        ),
    ],
)
def test_a_bad_trace_is_refused_by_file_row_and_column(
    text: str, message: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(text, encoding="utf-8")
    assert penstock(f"--trace {trace} {how} {STUDY}") == 2
    out = capsys.readouterr()
    assert out.err.startswith(f"penstock simulate: {trace}: ")
    assert message in out.err
    assert out.out == ""


def test_a_request_that_just_fits_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(f"{HEAD}0,9,8992\n", encoding="utf-8")
    (run,) = runs_of(f"--trace {trace} {STUDY}", capsys)
    assert run["finished"] == 1


def test_outputs_beyond_the_cap_of_a_study_must_fit_too(capsys: pytest.CaptureFixture[str]) -> None:
    """They are not cut there, so such a request would be evicted again and again."""
    assert penstock(f"--input 5 --output 8996-8999 --requests 30 --cap 100 {STUDY}") == 2
    assert "output tokens is 899" in capsys.readouterr().err


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "b.csv"
    trace.write_text("Timestamp,Request tokens,Response tokens\n0,3,4\n1,5,0\n", encoding="utf-8")
    words = f"--trace {trace} --requests 9 --arrivals trace {STUDY} --json -"
    assert penstock(words) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "1 failed requests of the trace (0 tokens) left out",
        "the trace has only 1 of 9 requests",
    ]
