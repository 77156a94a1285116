"""What recorded steps are fitted on, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from penstock.cli import app
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.tiles import Tiles
from penstock.sim import profiles
from penstock.sim.profiling.steps import samples_of, split
from penstock.sim.recording import StepFile, StepRecord

TRUTH = Affine(step=2e-3, token=1e-4, work=2e-8, request=3e-4, context=1e-6)


def test_held_out_blocks_are_every_fifth_and_first_steps_get_the_usual_host_time() -> None:
    records = [StepRecord(StepLoad(1, i), 1.0, 0.25 if i else None) for i in range(500)]
    samples = samples_of(records)
    assert {sample.seconds for sample in samples} == {1.25}
    fitted, held = split(samples)
    assert [sample.load.context for sample in held] == [*range(200, 250), *range(450, 500)]
    assert len(fitted) == 400


def test_recorded_steps_become_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = [tmp_path / "steps.0", tmp_path / "steps.1"], tmp_path / "mine.json"
    lines = []
    for i in range(600):
        decoding, prefill = i % 20, 31 * i % 200
        load = StepLoad(
            decoding, decoding * (17 * i % 900), prefill, prefill**2 / 2, int(prefill > 0)
        )
        if decoding or prefill:
            seconds = 0.9 * TRUTH.seconds(load)
            lines.append(msgspec.json.encode(StepRecord(load, seconds, seconds / 9)))
    for half, file in enumerate(files):
        file.write_bytes(b"\n".join(lines[half::2]))
    with pytest.raises(SystemExit) as left:
        app(["profile", str(out), *(word for file in files for word in ("--steps", str(file)))])
    assert left.value.code in {None, 0}
    said = capsys.readouterr().out
    assert "0.0%" in said
    made = profiles.find(str(out))
    assert made.source == f"{len(lines)} recorded steps"
    assert made.coefficients["step"] == pytest.approx(TRUTH.step, rel=0.01)
    assert made.error == {"held_out_mape": 0.0}
    assert isinstance(profiles.load(str(out)), Affine)


def test_steps_in_tiles_become_a_profile_with_tiles(tmp_path: Path) -> None:
    truth = Tiles(16, 6e-4, 1e-3, 0.0, 1e-7, 3e-5, 5e-7, 3e-4)
    steps, out = tmp_path / "steps.jsonl", tmp_path / "mine.json"
    file = StepFile(steps)
    for i in range(600):
        decoding, prefill = 1 + i % 40, 31 * i % 97
        work = float(prefill * (7 * i % 500))
        load = StepLoad(decoding, decoding * (1 + 17 * i % 900), prefill, work, int(prefill > 0))
        file.add(StepRecord(load, truth.seconds(load), 0.0))
    file.close()
    with pytest.raises(SystemExit) as left:
        app(["profile", str(out), "--steps", str(steps)])
    assert left.value.code in {None, 0}
    made = profiles.load(str(out))
    assert isinstance(made, Tiles)
    assert made.rows == 16
    load = StepLoad(33, 9000, 20, 4000, 1)
    assert made.seconds(load) == pytest.approx(truth.seconds(load), rel=0.01)


def test_too_few_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.jsonl"
    steps.write_bytes(msgspec.json.encode(StepRecord(StepLoad(1, 1), 1.0, 0.1)))
    with pytest.raises(SystemExit) as left:
        app(["profile", str(tmp_path / "x.json"), "--steps", str(steps)])
    assert left.value.code == 2
    assert "it has 1 steps; at least 250 are needed" in capsys.readouterr().err
    steps.write_text(json.dumps({"not": "a step"}))
    with pytest.raises(SystemExit):
        app(["profile", str(tmp_path / "x.json"), "--steps", str(steps)])
    assert "line 1" in capsys.readouterr().err
