"""The load generator against the real server: its hook, its metrics, its presets."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from penstock.bench import compare
from penstock.bench.client import Target
from penstock.bench.compare import Entry
from penstock.bench.drive import HookError, Rules
from penstock.bench.fitted import fitted
from penstock.bench.local import ServeError, serve
from penstock.bench.measure import Load, Measurement, run
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result
from penstock.bench.workload import parse_slo

KV_TOKENS = 800
CAP = 380
COUNT = 32


def server(preset: str, *more: str) -> list[str]:
    return [
        "demo", "--engine", "scripted", "--preset", preset, "--kv-tokens", str(KV_TOKENS),
        "--no-prefix-cache", *more,
    ]  # fmt: skip


def go(url: str, slo: str, load: Load, **rules: object) -> Result:
    requests = fitted("sharegpt-o1", COUNT, seed=0).scaled(1 / 32).with_classes(parse_slo([slo]), 0)
    how = Rules(**{"cap": CAP, "retries": 2, **rules})
    return run(Measurement(Target(url, "demo"), requests, how, load, Prompts(requests)))


def test_presets_differ_as_the_paper_says(tmp_path: Path) -> None:
    entries = []
    for preset in ("tgi", "vllm", "oracle"):
        with serve(server(preset, "--trace-lengths")) as url:
            entries.append(Entry(preset, go(url, "ttft=60,gap=60", Load(clients=24))))
    conservative, aggressive, oracle = (e.result for e in entries)
    for entry in entries:
        assert entry.result.summary.ends == {"completed": COUNT}
        assert entry.result.summary.attainment == 1
    assert conservative.server.evictions == 0
    assert oracle.server.evictions == 0
    assert aggressive.server.evictions > 0
    # Reserving 380 tokens for each of 800 lets two requests run at a time.
    assert max(kv for _, kv in conservative.server.kv_series) < 0.6
    assert oracle.summary.throughput_output_tps > 1.5 * conservative.summary.throughput_output_tps
    shown = Console(file=io.StringIO(), width=140)
    shown.print(compare.table(entries, "all"))
    assert "vllm (aggressive)" in shown.file.getvalue()
    png, page = compare.write(entries, "all <presets>", ["lead"], tmp_path, "all")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "all &lt;presets&gt;" in page.read_text(encoding="utf-8")


def test_a_server_without_the_hook_is_refused() -> None:
    with (
        serve(server("past-future")) as url,
        pytest.raises(HookError, match="start the server with --trace-lengths"),
    ):
        go(url, "ttft=60", Load(clients=1))


def test_clients_that_hang_up_cost_the_server_nothing() -> None:
    with serve(server("tgi", "--trace-lengths")) as url:
        result = go(url, "ttft=0.5", Load(clients=24, duration=5), patience=0.8, retries=1000)
        assert result.summary.ends["abandoned"] > 10
        assert result.summary.ends["completed"] > 0
        again = go(url, "ttft=60", Load(clients=2))
        assert again.summary.ends == {"completed": COUNT}


def test_a_server_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(ServeError, match=r"(?s)ended \(2\).*'nonsense' is unknown"),
        serve(server("nonsense")),
    ):
        pytest.fail("it started")
