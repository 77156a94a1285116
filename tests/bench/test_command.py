from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cyclopts
import pytest

from penstock.bench import scrape
from penstock.bench.command import bench

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
        ((*LOOP, *INPUT, "--slo", "gap"), "slo 'gap' is not understood"),
        ((*LOOP, *INPUT, "--token-range", "9"), "token_range is '9'"),
        ((*LOOP, *INPUT, "--retries", -1), "retries is -1"),
        ((*LOOP, *INPUT, "--patience", 0), "patience is 0.0"),
        ((*LOOP, *INPUT, "--duration", 1, "--warmup", 2), "warmup is 2.0 s"),
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
