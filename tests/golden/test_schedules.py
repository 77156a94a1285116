"""Every plan of each preset for one small load, byte for byte.

A change of a recorded schedule is a change of behaviour: look at the difference, then record it
with ``pytest tests/golden --update-golden`` and say why in the commit.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from penstock.core.policies import presets
from penstock.core.types import Capabilities, StepPlan
from tests.core.drive import Job, Outcome, policy, run

HERE = Path(__file__).parent
NAMES = sorted(presets.PRESETS)
MACHINE = Capabilities(
    kv_blocks=30,
    block_size=4,
    max_batch=8,
    max_step_tokens=24,
    max_request_tokens=80,
    depth=2,
    prefix_cache=True,
)
# A window that ends within the load shows the forecast learning.
OVERRIDES: dict[str, dict[str, Any]] = {
    "past-future": {"window": 8},
    "past-future-adaptive": {"window": 8, "reserve": 0.25, "evictions": 0.3},
    "past-future-artifact": {"window": 6, "cold_start": 20},
}


def load() -> list[Job]:
    """Twenty requests in two waves, half of them behind a common prompt, with one cancellation."""
    random = Random(20)
    stem = tuple(range(100, 112))
    return [
        Job(
            prompt=(stem if index % 2 else ())
            + tuple(random.randrange(100) for _ in range(random.randint(1, 24))),
            cap=30,
            length=random.randint(1, 35),
            arrival_step=random.randint(0, 10) + (40 if index >= 12 else 0),
            cancel_step=12 if index == 5 else None,
        )
        for index in range(20)
    ]


def line(plan: StepPlan) -> str:
    """A plan in a line: what is given back, who starts, chunks, who decodes."""
    parts = [f"{plan.number:3}"]
    for drop in plan.drops:
        left = "".join(f" {index}={key.hex()[:4]}" for index, key in drop.publish)
        parts.append(f"{'drop' if drop.final else 'evict'} {drop.id}{left}")
    if plan.forget:
        parts.append("forget " + " ".join(key.hex()[:4] for key in plan.forget))
    for start in plan.starts:
        cached = "".join(f" {key.hex()[:4]}" for key in start.cached)
        parts.append(f"start {start.id}:{start.tokens}{cached}")
    for chunk in plan.chunks:
        left = "".join(f" {index}={key.hex()[:4]}" for index, key in chunk.publish)
        end = chunk.start + chunk.tokens
        parts.append(f"chunk {chunk.id}[{chunk.start}:{end}]{'!' if chunk.samples else ''}{left}")
    if plan.decode:
        parts.append("decode " + " ".join(plan.decode))
    return " | ".join(parts)


def record(outcome: Outcome) -> str:
    """All plans, then how everyone ended."""
    ends = [
        f"end {end.id} {end.reason} {end.output_tokens} tokens {end.evictions} evictions"
        for end in outcome.ended.values()
    ]
    return "\n".join([*map(line, outcome.engine.plans), *ends]) + "\n"


def outcome_of(name: str) -> Outcome:
    return run(load(), MACHINE, policy(name, **OVERRIDES.get(name, {})))


@pytest.mark.parametrize("name", NAMES)
def test_schedule(name: str, *, update_golden: bool) -> None:
    path = HERE / f"{name}.txt"
    made = record(outcome_of(name)).encode()
    if update_golden:
        path.write_bytes(made)
    assert path.exists(), f"{path.name} is not recorded; run with --update-golden"
    assert made.decode().splitlines() == path.read_text(encoding="utf-8").splitlines()
    assert made == path.read_bytes()


def test_nothing_is_recorded_that_no_preset_makes() -> None:
    assert sorted(path.stem for path in HERE.glob("*.txt")) == NAMES


def test_the_load_shows_what_matters() -> None:
    """Evictions, shared blocks, and idle blocks given up: or the records would pin little."""
    text = {name: (HERE / f"{name}.txt").read_text(encoding="utf-8") for name in NAMES}
    assert text["vllm"].count("evict ") >= 3
    assert "evict " not in text["tgi"]
    for name in NAMES:
        assert "forget " in text[name]
        assert "cancelled" in text[name]
        assert any(": " not in part and " " in part[6:] for part in _starts(text[name])), name
    # DistServe's answers are vLLM's; they differ in what they are run on.
    assert text.pop("distserve") == text["vllm"]
    assert len(set(text.values())) == len(text), "two presets do the same"


def _starts(text: str) -> list[str]:
    parts = [part for row in text.splitlines() for part in row.split(" | ")]
    return [part for part in parts if part.startswith("start ")]
