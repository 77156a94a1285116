"""What cannot be written is refused in words, before any work where that can be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.cli import app
from penstock.sim.output import check_targets

LOAD = "--input 5 --output 3 --requests 5 --rate 1 --kv-tokens 100 --steps-only --slo ttft=9"


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that was called wrongly says."""
    with pytest.raises(SystemExit) as left:
        app(words)
    assert left.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


@pytest.mark.parametrize(
    "words",
    [
        f"simulate {LOAD}",
        f"capacity {LOAD} --seeds 1",
        f"sweep {LOAD} --out OUT --jobs 1",
        "validate nothing.jsonl --profile nothing --kv-tokens 9",
    ],
)
def test_a_json_file_that_cannot_be_written_is_named(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = words.replace("OUT", str(tmp_path / "out")).split()
    missing = tmp_path / "nope" / "x.json"
    said = failure([*call, "--json", str(missing)], capsys)
    assert f"json is '{missing}'; it must be a file that can be written" in said
    said = failure([*call, "--json", str(tmp_path)], capsys)
    assert f"json is '{tmp_path}'; it must be a file that can be written (Is a directory)" in said


@pytest.mark.parametrize("option", ["--html", "--chrome-trace"])
def test_so_are_reports_and_traces(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(["simulate", *LOAD.split(), option, str(tmp_path)], capsys)
    assert f"{option[2:]} is '{tmp_path}'; it must be a file that can be written" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_a_disk_that_is_full_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(["simulate", *LOAD.split(), "--json", "/dev/full"], capsys)
    assert said.startswith("penstock simulate: [Errno 28]")


def test_the_numbers_of_a_sweep_may_go_beside_its_runs(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(SystemExit) as left:
        app(["sweep", *LOAD.split(), "--out", str(folder), "--json", str(folder / "x.json")])
    assert left.value.code in {None, 0}
    assert json.loads((folder / "x.json").read_text())["cells"]


def test_a_file_of_its_own_and_standard_output_can_be_written(tmp_path: Path) -> None:
    check_targets(json="-", html=None)
    check_targets(json=str(tmp_path / "x.json"))
    assert list(tmp_path.iterdir()) == []
