"""A sweep makes each run once, keeps what is done, and loses nothing to one bad run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import cyclopts
import msgspec
import polars as pl
import pytest

from penstock.sim.command import MachineOptions, RequestOptions
from penstock.sim.execute import one_run
from penstock.sim.grid import grid, parse_axes, parse_axis
from penstock.sim.interval import interval, ratio, student_t
from penstock.sim.parallel import outcomes
from penstock.sim.profiles import find
from penstock.sim.spec import RunSpec
from penstock.sim.sweep import CELLS, Cell, groups, sweep
from penstock.sim.sweep_command import sweep_command

app = cyclopts.App(name="penstock", result_action="return_value")
app.command(sweep_command, name="sweep")
BASE = "--input 8-40 --output 4-20 --requests 40 --kv-tokens 300 --max-batch 16 --steps-only"
LOADS = "--slo ttft=30,gap=3 --over rate=0.2,0.6 --over seed=0-1"

HERE = partial(outcomes, workers=1)
REQUESTS = RequestOptions(input="8-40", output="4-20", requests=30, rate=0.5)
MACHINE = MachineOptions(kv_tokens=300, max_batch=16, steps_only=True)


def penstock(words: str) -> int:
    return app(["sweep", *words.split()], exit_on_error=False)


def cells_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    out = capsys.readouterr()
    assert out.err == ""
    return json.loads(out.out)["cells"]


def without_time(cells: list[dict[str, object]]) -> list[dict[str, object]]:
    for cell in cells:
        cell["at"] = cell["result"]["wall_s"] = 0.0
    return cells


def test_a_grid_is_every_combination_once() -> None:
    given = msgspec.structs.replace
    axes = parse_axes(["parameters.reserve=0,0.05", "seed=0-2", "kv-tokens=300,400"])
    machine = MachineOptions(preset="past-future,vllm", kv_tokens=300, steps_only=True)
    specs = grid(REQUESTS, machine, axes)
    # The reserve means nothing to vllm: 2 x 3 x 2 and 3 x 2.
    assert len(specs) == 18
    assert len({spec.key() for spec in specs}) == 18
    assert {spec.kv_tokens for spec in specs} == {300, 400}
    assert all(given(spec, seed=0).seed == 0 for spec in specs)
    assert grid(REQUESTS, MACHINE, parse_axes(["instances=1,2"]))[1].instances == 2


def test_values_with_commas_are_separated_by_semicolons() -> None:
    axis = parse_axis("slo=ttft=1,gap=0.1;ttft=2")
    assert axis.values == ("ttft=1,gap=0.1", "ttft=2")
    assert [spec.slo for spec in grid(REQUESTS, MACHINE, [axis])] == [
        ("ttft=1,gap=0.1",),
        ("ttft=2",),
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rate"], "write FIELD=V1,V2"),
        (["speeed=1,2"], "with one of: .*speed"),
        (["rate="], "names no values"),
        (["rate=1,fast"], "'rate=1,fast'"),
        (["rate=1,1"], "the value 1.0 twice"),
        (["rate=1", "rate=2"], "names rate twice"),
        (["preset=best"], "preset 'best' is unknown"),
        (["parameters.reserve=0,2"], r"reserve is 2\.0"),
        (["rate=nan"], "rate is nan; it must be a finite number above 0"),
        (["seed=-1,2"], "seed is -1; it must be at least 0"),
        (["parameters.watermark=0.9"], "none of the presets past-future has it"),
    ],
)
def test_what_is_wrong_with_an_axis_is_said(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(REQUESTS, MACHINE, parse_axes(texts))


def test_presets_with_slices_are_checked_as_those_without(tmp_path: Path) -> None:
    machine = MachineOptions(
        preset="scls,vllm", kv_tokens=9000, profile="llama-2-7b/a100-80g", place="round-robin",
        parameters={"slice_tokens": 16},
    )  # fmt: skip
    asked = replace(REQUESTS, cap=20, rate=9.0)
    cells = sweep(grid(asked, machine, parse_axes(["instances=1,2"])), tmp_path, HERE)
    assert [cell.result.finished for cell in cells] == [30] * 4
    for changes, message in (
        ({"parameters": {"slice_tokens": 0}}, r"slice_tokens is 0"),
        ({"place": "nowhere"}, "place 'nowhere' is unknown"),
        ({"place": "max-min"}, "place 'max-min' needs a preset with slices"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(asked, replace(machine, **changes))


def test_results_are_those_of_single_runs_and_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--preset past-future,vllm {BASE} {LOADS} --out {tmp_path} --json -"
    assert penstock(f"{words} --jobs 2") == 0
    parallel = without_time(cells_of(capsys))
    assert len(parallel) == 8
    for cell in parallel:
        spec = msgspec.convert(cell["spec"], RunSpec)
        alone = json.loads(msgspec.json.encode(one_run(spec)))
        assert cell["result"] == {**alone, "wall_s": 0.0}
    assert json.loads((tmp_path / "sweep.json").read_text())["machine"]
    table = pl.read_parquet(tmp_path / "sweep.parquet")
    assert table["goodput_output_tps"].to_list() == [
        cell["result"]["goodput_output_tps"] for cell in parallel
    ]

    assert penstock(f"{words} --jobs 1 --fresh") == 0
    assert without_time(cells_of(capsys)) == parallel


def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    specs = grid(REQUESTS, MACHINE, parse_axes(["seed=0-3"]))
    first = sweep(specs[:2], tmp_path, HERE)
    with (tmp_path / CELLS).open("ab") as file:
        file.write(b'{"key":"cut off by an interr')  # no line's end
    told: list[Cell] = []
    cells = sweep(specs, tmp_path, HERE, on_cell=told.append)
    assert cells[:2] == first
    assert [cell.at for cell in told[:2]] == [cell.at for cell in first]
    assert len((tmp_path / CELLS).read_bytes().splitlines()) == 4
    assert sweep(specs, tmp_path, HERE) == cells
    assert sweep(specs[:1], tmp_path, HERE, fresh=True)[0].at > cells[0].at


def test_a_run_that_fails_is_reported_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{BASE} --rate 0.5 --out {tmp_path} --over kv_tokens=300,30"
    assert penstock(f"{words} --json -") == 1
    good, bad = cells_of(capsys)
    assert good["result"] is not None
    assert bad["result"] is None
    assert "can never fit kv_tokens (30)" in bad["error"]
    assert penstock(words) == 1
    out = capsys.readouterr().out
    assert "failed: past-future" in out
    assert "1 runs" not in out
    lines = (tmp_path / CELLS).read_bytes().splitlines()
    assert sorted(json.loads(line)["error"] is None for line in lines) == [False, False, True]
    assert pl.read_parquet(tmp_path / "sweep.parquet")["error"].null_count() == 1


def die(job: bytes) -> bytes:
    """Work that kills its process at one of its jobs."""
    if job == b"bad":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == b"wrong":
        raise RuntimeError("wrong")
    return job


def test_a_process_that_dies_costs_its_own_job_only() -> None:
    jobs = [b"0", b"wrong", b"bad", b"3", b"4", b"5"]
    found = sorted(outcomes(die, jobs, 2))
    assert [one.value for one in found] == [b"0", None, None, b"3", b"4", b"5"]
    assert found[1].error == "RuntimeError: wrong"
    assert "died" in found[2].error
    assert multiprocessing.active_children() == []
    with pytest.raises(ValueError, match="jobs is 0"):
        next(outcomes(die, jobs, 0))


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    words = ["sweep", *BASE.replace("40 --kv", "250 --kv").split(), "--rate", "0.5"]
    words += ["--over", "seed=0-11", "--jobs", "2", "--out", str(tmp_path)]
    script = "import sys; from penstock.cli import main; sys.argv[0] = 'penstock'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True
    )
    store = tmp_path / CELLS
    while not (store.exists() and len(store.read_bytes().splitlines()) >= 2):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.startswith("penstock sweep: interrupted;")
    assert "Traceback" not in error
    before = store.read_bytes()
    assert 2 <= len(before.splitlines()) < 12
    assert penstock(" ".join(words[1:])) == 0
    assert store.read_bytes().startswith(before)
    assert len(store.read_bytes().splitlines()) == 12


def test_two_sweeps_do_not_share_a_folder_at_once_and_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = grid(REQUESTS, MACHINE, parse_axes(["seed=0,1"]))

    def another(cell: Cell) -> None:
        del cell
        with pytest.raises(ValueError, match="another sweep is writing"):
            sweep(specs, tmp_path, HERE)

    sweep(specs, tmp_path, HERE, on_cell=another)
    (tmp_path / CELLS).write_text("something else\n")
    assert penstock(f"{BASE} --rate 0.5 --out {tmp_path}") == 2
    assert "cells.jsonl: line 1 is no cell" in capsys.readouterr().err


def test_another_trace_under_the_same_name_is_another_run(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    asked = RequestOptions(trace=trace, rate=0.5)
    keys = []
    for output in (3, 5):
        trace.write_text(f"prompt_tokens,output_tokens\n5,{output}\n9,4\n", encoding="utf-8")
        keys.append(grid(asked, MACHINE)[0].key())
    assert keys[0] != keys[1]


def test_another_profile_under_the_same_name_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    usual = find("llama-3.1-8b/h100")
    usual.save(path)
    machine = MachineOptions(kv_tokens=300, max_batch=16, profile=str(path))
    specs = grid(REQUESTS, machine)
    (first,) = sweep(specs, tmp_path, HERE)
    coefficients = {name: 2 * value for name, value in usual.coefficients.items()}
    msgspec.structs.replace(usual, coefficients=coefficients).save(path)
    (slower,) = sweep(specs, tmp_path, HERE)
    assert slower.key != first.key
    assert slower.result.latency["tpot"]["mean"] > 1.5 * first.result.latency["tpot"]["mean"]


def test_groups_hold_the_seeds_of_a_point(tmp_path: Path) -> None:
    specs = grid(REQUESTS, MACHINE, parse_axes(["rate=0.2,0.6", "seed=0-3"]))
    cells = sweep(specs, tmp_path, HERE)
    first, second = groups(cells)
    assert first.seeds == second.seeds == (0, 1, 2, 3)
    assert (first.spec.rate, second.spec.rate) == (0.2, 0.6)
    goodputs = [cell.result.goodput_output_tps for cell in cells[:4]]
    assert first.goodput_output_tps == interval(goodputs)
    assert first.goodput_output_tps.low < first.goodput_output_tps.mean


def test_intervals_are_students() -> None:
    found = interval([3.0, 4.0, 5.0, 8.0])
    assert found.mean == 5
    assert found.high == pytest.approx(5 + 3.182 * 2.1602469 / 2, abs=1e-4)
    assert interval([7.0]) == (7, None, None)
    assert student_t(40) == pytest.approx(2.0211, abs=1e-3)
    same = ratio([2.0, 4.0], [1.0, 2.0])
    assert same == pytest.approx((2, 2, 2))


def test_runs_on_ray_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    words = f"--preset past-future,vllm {BASE} --slo ttft=30 --over seed=0-1 --json -"
    assert penstock(f"{words} --out {tmp_path / 'here'} --jobs 1") == 0
    here = json.loads(capsys.readouterr().out)["cells"]
    assert penstock(f"{words} --out {tmp_path / 'there'} --ray local") == 0
    there = json.loads(capsys.readouterr().out)["cells"]
    assert without_time(there) == without_time(here)
    assert penstock(f"{words} --out {tmp_path / 'there'} --ray 127.0.0.1:1") == 0, "all is done"
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 4


def test_a_ray_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    words = f"--preset vllm {BASE} --over seed=0-1 --out {tmp_path}"
    assert penstock(f"{words} --ray 127.0.0.1:1") == 2
    assert "penstock sweep: --ray 127.0.0.1:1: " in capsys.readouterr().err
    assert penstock(f"{words} --ray local --jobs 2") == 2
    assert "--jobs 2: with --ray, Ray says how many run at a time" in capsys.readouterr().err
