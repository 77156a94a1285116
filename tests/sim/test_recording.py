"""Recorded steps: what was computed, what it took, and what the host took in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.engine import Work
from penstock.core.forecast.latency.affine import Affine
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Request
from penstock.sim.clock import VirtualClock
from penstock.sim.recording import RecordingEngine, StepFile, StepRecord, read_steps
from penstock.sim.served import ServedEngine

MODEL = Affine(step=0.01, token=1e-4, work=1e-7, request=1e-3, context=1e-5)
MACHINE = Capabilities(
    kv_blocks=40, block_size=4, max_batch=8, max_step_tokens=24, max_request_tokens=150
)


def recorded(host: float, requests: int, keep: list[StepRecord]) -> int:
    """Serve requests with so much host time between steps; the number of evictions."""
    clock = VirtualClock()
    inner = ServedEngine(MACHINE, MODEL, vocab_size=9, clock=clock, sleep=clock.advance)
    engine = RecordingEngine(inner, keep.append, clock)
    runtime = Runtime(Scheduler(MACHINE, presets.build("vllm")), engine, clock)
    for i in range(requests):
        work = Work([1] * (10 + 3 * i), trace_length=20 + i)
        runtime.add(Request(str(i), 10 + 3 * i, 60, clock.now), work)
    while runtime.step() is not None:
        clock.advance(host)
    runtime.scheduler.check()
    assert not engine._known
    return runtime.scheduler.evictions


def test_each_step_is_what_the_model_was_asked_for() -> None:
    steps: list[StepRecord] = []
    evictions = recorded(0.002, 10, steps)
    assert evictions > 2  # recomputing is in it
    assert any(step.load.chunks and step.load.decoding for step in steps)
    for step in steps:
        assert step.seconds == pytest.approx(MODEL.seconds(step.load))
    assert sum(step.host is None for step in steps) == 1
    # The served engine's steps begin when the step before ended: the host's time is inside.
    assert all(step.total == pytest.approx(step.seconds) for step in steps if step.host is not None)


def test_host_time_is_what_the_engine_does_not_account_for() -> None:
    steps: list[StepRecord] = []
    recorded(0.5, 1, steps)
    totals = [step.total for step in steps]
    assert totals[0] is None
    assert totals[1:] == pytest.approx([0.5] * (len(totals) - 1))


def test_idle_time_is_no_host_time() -> None:
    clock = VirtualClock()
    keep: list[StepRecord] = []
    inner = ServedEngine(MACHINE, MODEL, vocab_size=9, clock=clock, sleep=clock.advance)
    engine = RecordingEngine(inner, keep.append, clock)
    runtime = Runtime(Scheduler(MACHINE, presets.build("vllm")), engine, clock)
    for name in "ab":
        runtime.add(Request(name, 5, 9, clock.now), Work([1] * 5, trace_length=3))
        while runtime.step() is not None:
            pass
        clock.advance(100.0)
    assert [step.host is None for step in keep] == [True, False, False] * 2


def test_files_are_read_as_written_and_bad_lines_are_named(tmp_path: Path) -> None:
    steps: list[StepRecord] = []
    recorded(0.002, 3, steps)
    path = tmp_path / "steps.jsonl"
    for part in (steps[:5], steps[5:]):  # a second process adds to the file
        file = StepFile(path)
        for step in part:
            file.add(step)
        file.close()
    assert read_steps(path) == steps
    with path.open("a") as more:
        more.write("[1, 2]\n")
    with pytest.raises(ValueError, match=rf"steps\.jsonl, line {len(steps) + 1}: no step"):
        read_steps(path)


def test_engines_that_run_ahead_are_refused() -> None:
    engine = ServedEngine(MACHINE, MODEL, vocab_size=9)
    engine.capabilities = replace(MACHINE, max_repeat=8)
    with pytest.raises(ValueError, match="max_repeat 8"):
        RecordingEngine(engine, print)
