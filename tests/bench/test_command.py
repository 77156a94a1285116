from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cyclopts
import numpy as np
import pytest

from penstock import cli
from penstock.bench import scrape
from penstock.bench.command import LoadOptions, WorkloadOptions, bench, build_workload
from penstock.bench.traces import SPREAD
from penstock.bench.workload import Workload

if TYPE_CHECKING:
    from conftest import FakeServer

app = cyclopts.App(name="penstock", result_action="return_value")
app.command(bench)


def penstock(*words: object) -> int:
    return app(["bench", *map(str, words)], exit_on_error=False)


def test_json_alone_on_standard_output(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.token_seconds = 0.1
    code = penstock(
        "--url", fake.url, "--clients", 2, "--input", "uniform:3-9", "--output", "uniform:1-4",
        "--requests", 8, "--slo", "a*1:ttft=5", "--slo", "b*1:gap=5", "--json", "-",
    )  # fmt: skip
    out = capsys.readouterr()
    data = json.loads(out.out)
    assert code == 0
    assert out.err == ""
    assert data["lengths"] == "hidden"
    assert data["summary"]["attempts"] == 8
    assert data["summary"]["attainment"] == 1
    assert sum(data["attempts"]["output_tokens"]) > 8
    assert set(data["attempts"]["slo_class"]) == {"a", "b"}
    assert data["settings"]["cap"] == 4
    assert data["server"]["kv_use_mean"] == 0.5
    assert len({len(column) for column in data["attempts"].values()}) == 1


def test_table_and_reports(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t<b>.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,40,4\n0.1,80,8\n", encoding="utf-8")
    code = penstock(
        "--url", fake.url, "--arrivals", "trace", "--trace", trace, "--scale", 0.5,
        "--slo", "ttft=5,gap=5", "--html", tmp_path / "r.html", "--json", tmp_path / "r.json",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    assert "goodput (output)" in shown
    assert "lengths scaled by 0.5" in shown
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "t&lt;b&gt;.csv" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace(fake.url, "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert json.loads((tmp_path / "r.json").read_bytes())["summary"]["attempts"] == 2
    assert [len(b["prompt"]) for b in fake.measured] == [20, 40]


LOOP = ("--clients", 1)
INPUT = ("--input", "5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lengths", "sharegpt-o1"), "give --clients for a closed loop"),
        ((*LOOP, "--rate", 2), "give --clients for a closed loop"),
        ((*LOOP, *INPUT, "--lengths", "sharegpt-o1"), "one of --trace, --lengths and --input"),
        ((*LOOP, "--input", "x"), "'x' is not understood"),
        ((*LOOP, "--output", "5"), "--output needs --input"),
        ((*LOOP, *INPUT, "--output", "model"), "--output model needs --cap"),
        ((*LOOP, *INPUT, "--cap", 4), "cap is 4, below the longest output of 5"),
        ((*LOOP, *INPUT, "--scale", 2), "scale is 2.0; it must be in (0, 1]"),
        ((*LOOP, *INPUT, "--requests", 0), "requests is 0"),
        ((*LOOP, *INPUT, "--requests", 999999999999999), "must be from 1 to 10000000"),
        ((*LOOP, *INPUT, "--seed", -1), "seed is -1; it must be at least 0"),
        ((*LOOP, "--input", "9" * 20), f"'{'9' * 20}' is out of range"),
        ((*LOOP, *INPUT, "--output", "9" * 20), "must be at most 2147483647"),
        ((*LOOP, *INPUT, "--timeout", 0), "timeout is 0.0; it must be a number of seconds above 0"),
        ((*LOOP, *INPUT, "--timeout", -1), "timeout is -1.0"),
        ((*LOOP, *INPUT, "--timeout", "nan"), "timeout is nan"),
        ((*LOOP, *INPUT, "--timeout", "inf"), "timeout is inf"),
        (
            (*LOOP, *INPUT, "--json", "nowhere/r.json"),
            "json is 'nowhere/r.json'; it must be a file",
        ),
        ((*LOOP, *INPUT, "--html", "/"), "html is '/'; it must be a file that can be written"),
        ((*LOOP, *INPUT, "--slo", "gap"), "slo 'gap' is not understood"),
        ((*LOOP, *INPUT, "--token-range", "9"), "token_range is '9'"),
        ((*LOOP, *INPUT, "--retries", -1), "retries is -1"),
        ((*LOOP, *INPUT, "--patience", 0), "patience is 0.0"),
        ((*LOOP, *INPUT, "--duration", 1, "--warmup", 2), "warmup is 2.0 s"),
        ((*LOOP, *INPUT, "--warmup", "nan"), "warmup is nan s"),
        ((*LOOP, *INPUT, "--url", "localhost"), "url is 'localhost'"),
        ((*LOOP, "--lengths", "gpt"), "lengths is 'gpt'"),
        (("--clients", 0, *INPUT), "clients is 0"),
        (("--rate", 0, *INPUT), "rate is 0.0"),
        (("--rate", 1, "--arrivals", "often", *INPUT), "arrivals is 'often'"),
        (("--arrivals", "gamma:2", *INPUT), "needs --rate"),
        (("--arrivals", "trace", *INPUT), "has no arrival times"),
        ((*LOOP, "--trace", "missing.csv"), "missing.csv"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert penstock(*words) == 2
    assert message in capsys.readouterr().err


def test_a_refused_run_leaves_its_files_as_they_were(tmp_path: Path) -> None:
    kept, new, link = tmp_path / "kept.json", tmp_path / "new.html", tmp_path / "link"
    kept.write_text("before", encoding="utf-8")
    link.symlink_to(tmp_path / "target")
    for page in (new, link):
        assert penstock("--json", kept, "--html", page, *LOOP, "--input", "x") == 2
    assert kept.read_text(encoding="utf-8") == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"kept.json", "link"}


def test_a_pipe_is_not_opened_before_the_run(tmp_path: Path) -> None:
    """To close it again would tell its reader that nothing more comes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    seen = select.poll()
    seen.register(reader)
    assert penstock("--json", pipe, *LOOP, "--input", "x") == 2
    assert seen.poll(0) == []
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_numbers_are_shown_when_they_cannot_be_written(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--url", fake.url, *LOOP, *INPUT, "--requests", 1)
    assert penstock(*words, "--json", "/dev/full", "--html", "/dev/full") == 2
    out = capsys.readouterr()
    assert "goodput (output)" in out.out
    assert "report:" not in out.out
    for name in ("json", "html"):
        assert f"{name} is '/dev/full'; it must be a file that can be written (No space" in out.err
    assert penstock(*words, "--json", "-", "--html", "/dev/full") == 2
    assert json.loads(capsys.readouterr().out)["summary"]["attempts"] == 1


def rows(count: int) -> str:
    body = "".join(f"{i},{i + 1},{i + 101}\n" for i in range(count))
    return f"arrival_s,prompt_tokens,output_tokens\n{body}"


def mooncake(count: int) -> str:
    each = ({"timestamp": 0 if i < 2 else 10 * i, "input_length": 513 + i, "output_length": i + 1,
             "hash_ids": [i, i + 1]} for i in range(count))  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in each)


def traced(path: Path, load: LoadOptions, seed: int = 0, requests: int | None = None) -> Workload:
    return build_workload(WorkloadOptions(trace=path, seed=seed, requests=requests), load)


def test_a_rate_draws_from_a_trace_at_random(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(rows(30), encoding="utf-8")
    load = LoadOptions(rate=2.0)
    drawn = traced(trace, load)
    assert sorted(drawn.prompt) == list(range(1, 31))
    assert list(drawn.prompt) != sorted(drawn.prompt)
    assert (drawn.output == drawn.prompt + 100).all()
    assert list(drawn.prompt) == list(traced(trace, load).prompt)
    assert list(drawn.prompt) != list(traced(trace, load, seed=1).prompt)
    assert len(traced(trace, load, requests=40)) == 40
    assert list(traced(trace, LoadOptions(clients=2)).prompt) == list(range(1, 31))
    assert list(traced(trace, LoadOptions(arrivals="trace")).prompt) == list(range(1, 31))


@pytest.mark.parametrize("requests", [None, 12, 90])
def test_a_rate_takes_a_random_stretch_of_a_trace_with_prefixes(
    requests: int | None, tmp_path: Path
) -> None:
    trace = tmp_path / "m.jsonl"
    trace.write_text(mooncake(30), encoding="utf-8")
    drawn = [traced(trace, LoadOptions(rate=2.0), seed, requests) for seed in range(9)]
    for each in drawn:
        which = (each.prompt - 513).tolist()
        assert len(which) == min(requests or 30, 30)
        assert which == [(which[0] + i) % 30 for i in range(len(which))]
        assert each.hash_ids == tuple((i, i + 1) for i in which)
        assert (np.diff(each.arrival) > 0).all()
        assert any("a random stretch of the trace in its own order" in n for n in each.notes)
        assert any("only 30 of 90" in note for note in each.notes) == (requests == 90)
    assert len({int(each.prompt[0]) for each in drawn}) > 1


def test_times_that_are_replaced_are_not_said_to_be_spread(tmp_path: Path) -> None:
    trace = tmp_path / "m.jsonl"
    trace.write_text(mooncake(5), encoding="utf-8")
    for load, spread in (
        (LoadOptions(arrivals="trace"), True),
        (LoadOptions(rate=2.0), False),
        (LoadOptions(clients=2), False),
    ):
        assert (SPREAD in traced(trace, load).notes) == spread


@pytest.mark.parametrize("value", ["20000.7", "0.6", "1.e999"])
@pytest.mark.parametrize(
    "words", ["simulate --kv-tokens", "simulate --seed", "serve demo --port", "bench --clients"]
)
def test_a_number_with_a_fraction_is_not_rounded(
    words: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.app([*words.split(), value])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"{words.rsplit(maxsplit=1)[-1]}: {value} is not a whole number" in said


@pytest.mark.parametrize("value", ["9000", "9_000", "9000.0", "0x2328"])
def test_a_whole_number_can_be_written_in_several_ways(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"simulate --steps-only --input 5 --output 5 --requests 2 --json - --kv-tokens {value}"
    with pytest.raises(SystemExit) as caught:
        cli.app(words.split())
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["settings"]["kv_tokens"] == 9000


def test_a_failing_endpoint_is_exit_code_1(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.hook = False
    assert penstock("--url", fake.url, *LOOP, *INPUT) == 1
    assert "--engine-has-no-hook" in capsys.readouterr().err
    assert penstock("--url", "http://127.0.0.1:9", *LOOP, *INPUT) == 1
    assert "give --model" in capsys.readouterr().err


def test_leaking_has_to_be_said(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.hook = False
    words = ("--url", fake.url, *LOOP, *INPUT, "--requests", 2, "--engine-has-no-hook")
    assert penstock(*words, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == "leaked"


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, penstock.bench.command, penstock.bench.html; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_server_numbers_are_summed_over_labels() -> None:
    seen = scrape.parse(
        "# TYPE vllm:num_preemptions counter\n"
        'vllm:num_preemptions_total{engine="0"} 3\n'
        'vllm:num_preemptions_total{engine="1"} 4\n'
        "# TYPE vllm:kv_cache_usage_perc gauge\n"
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        'vllm:kv_cache_usage_perc{engine="1"} 0.75\n'
        "# TYPE other_total counter\nother_total 9\n"
    )
    assert seen == {"num_preemptions_total": 7, "kv_cache_usage_perc": 0.75}


def test_evictions_are_those_of_the_window() -> None:
    samples = [(float(t), {scrape.EVICTIONS: e}) for t, e in enumerate([5, 5, 9, 12])]
    assert scrape.ServerSide(samples).evictions(1.0, 3.0) == 7
    assert scrape.ServerSide().evictions(0.0, 1.0) is None
