"""Reports stand alone, hold the numbers of their runs, and say what they show."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import cyclopts
import pytest

from penstock.sim.command import simulate
from penstock.sim.figures import COLOURS
from penstock.sim.sweep_command import sweep_command

app = cyclopts.App(name="penstock", result_action="return_value")
app.command(simulate)
app.command(sweep_command, name="sweep")
LOAD = (
    "--input 8-40 --output 4-20 --requests 60 --kv-tokens 300 --max-batch 16 --steps-only "
    "--slo chat*0.7:ttft=20,gap=3 --slo batch*0.3:e2e=90 --preset vllm,tgi"
)


def penstock(words: str) -> int:
    return app(words.split(), exit_on_error=False)


def check_page(path: Path) -> str:
    """The page's text, once it is known to load nothing and to be drawn whole."""
    page = path.read_text(encoding="utf-8")
    # Names of XML vocabularies and sources in words are no loads.
    assert re.findall(r"(?:src|href)=[\"'](?!#)[^\"']+", page) == []
    assert re.findall(r"url\((?!#)|@import|<script|<link", page) == []
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ET.fromstring(drawn)  # noqa: S314 - our own
        assert root.get("aria-label")
    for placeholder in COLOURS:
        assert placeholder not in page
    for name in set(re.findall(r"var\(--(\w+)\)", page)):
        assert page.count(f"--{name}:") == 2, f"{name} is not set for light and dark"
    return page


def rows_of(page: str, title: str) -> list[list[str]]:
    part = page.partition(f"<h2>{title}")[2] if title else page
    table = part.partition("<table>")[2].partition("</table>")[0]
    return [
        re.findall(r"<t[dh]>(.*?)</t[dh]>", row)
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    ]


def test_the_report_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.html"
    assert penstock(f"simulate {LOAD} --rate 0.6 --html {target} --json -") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    page = check_page(target)
    assert page.count("<svg") == 2 + 2 * 4
    for run in runs:
        assert f"Over time: {run['preset']}" in page
    table = rows_of(page, "")
    assert [row[0] for row in table] == ["policy", "vllm", "tgi"]
    classes = rows_of(page, "By class")
    assert [(row[0], row[1]) for row in classes[1:]] == [
        ("vllm", "batch"), ("vllm", "chat"), ("tgi", "batch"), ("tgi", "chat"),
    ]  # fmt: skip
    assert sum(int(row[2]) for row in classes[1:3]) == 60
    assert "read steps for seconds" in page
    assert "forecast peak" in page


def test_the_report_of_timed_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.html"
    load = LOAD.replace("--steps-only", "--profile llama-3.1-8b/h100")
    load = load.replace("ttft=20,gap=3", "ttft=0.2,gap=0.05").replace("e2e=90", "e2e=0.5")
    assert penstock(f"simulate {load} --rate 150 --html {target} --json -") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    page = check_page(target)
    assert runs[0]["evictions"] > 0
    assert f"{runs[0]['evictions']:,} in all" in page
    assert "read steps for seconds" not in page
    for run, row in zip(runs, rows_of(page, "")[1:], strict=True):
        assert float(row[1].replace(",", "")) == pytest.approx(run["goodput_output_tps"], abs=0.06)


def test_the_report_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "s.html"
    words = f"sweep {LOAD} --out {tmp_path} --jobs 1 --over rate=0.1,0.3,0.6 --over seed=0-1"
    assert penstock(f"{words} --html {target} --json -") == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    page = check_page(target)
    assert page.count("<svg") == 4 + 2 * 4
    table = rows_of(page, "All loads")
    assert len(table) == 1 + len(groups) == 7
    means = {(g["policy"], f"{g['load']:g}"): g["goodput_output_tps"][0] for g in groups}
    for row in table[1:]:
        assert float(row[2].split(" ±")[0]) == pytest.approx(means[row[0], row[1]], abs=0.06)
    spread = {
        load: max(v) - min(v)
        for load in {g["load"] for g in groups}
        if (v := [g["attainment"][0] for g in groups if g["load"] == load])
    }
    assert f"at {max(spread, key=spread.get):g} req/s, seed 0" in page

    assert penstock(f"{words} --html {target} --show 0.1") == 0
    assert "vllm, at 0.1 req/s, seed 0" in check_page(target)
    assert penstock(f"{words} --html {target} --show 7") == 2
    assert "show is 7; the sweep has the loads 0.1, 0.3, 0.6" in capsys.readouterr().err


def test_a_sweep_with_a_dispatcher_has_a_report_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such runs cannot be watched; the others are."""
    target = tmp_path / "s.html"
    words = (
        f"sweep --preset scls,past-future --input 8-40 --output 4-20 --requests 30 --cap 200 "
        f"--kv-tokens 9000 --profile llama-2-7b/a100-80g --out {tmp_path} --jobs 1 --speed 3"
    )
    assert penstock(f"{words} --over rate=0.1,0.2 --html {target} --json - --show 0.3") == 0
    assert {cell["load"] for cell in json.loads(capsys.readouterr().out)["cells"]} == {
        3 * 0.1,
        3 * 0.2,
    }
    page = check_page(target)
    assert "Over time: past-future, at 0.3 req/s" in page
    assert "Over time: scls" not in page
    assert "is not drawn for runs with a dispatcher" in page


def test_a_failed_run_is_named_in_the_report(tmp_path: Path) -> None:
    target = tmp_path / "s.html"
    words = f"sweep {LOAD} --rate 0.3 --out {tmp_path} --jobs 1 --over kv_tokens=300,30"
    assert penstock(f"{words} --html {target}") == 1
    page = check_page(target)
    assert "failed: vllm, 0.3 req/s, seed 0: " in page
    assert "can never fit kv_tokens (30)" in page


def test_words_from_outside_are_escaped(tmp_path: Path) -> None:
    trace = tmp_path / "<b>&.csv"
    trace.write_text("prompt_tokens,output_tokens\n5,3\n9,4\n", encoding="utf-8")
    target = tmp_path / "r.html"
    words = [
        "simulate",
        "--trace",
        str(trace),
        "--rate",
        "0.1",
        "--kv-tokens",
        "90",
        "--steps-only",
    ]
    assert app([*words, "--html", str(target)], exit_on_error=False) == 0
    page = check_page(target)
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;.csv" in page
