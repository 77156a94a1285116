"""The invariants of docs/design.md as properties, on every preset."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.scheduler import Scheduler
from penstock.core.snapshot import Decoding, Ints, Prompts
from penstock.core.types import Capabilities, FinishReason, OnMiss, Request, StepPlan
from tests.core.drive import Job, policy, result, run

NAMES = sorted(presets.PRESETS)
ORDERS = ["fcfs", "priority", *presets.RANKS]
SHARES = ["vllm", "tgi", "past-future"]


@st.composite
def machines(draw: st.DrawFn) -> Capabilities:
    """Small machines of every kind: block sizes, depths, with and without prefix cache."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_batch = draw(st.integers(1, 8))
    return Capabilities(
        kv_blocks=-(-draw(st.integers(40, 120)) // block_size),
        block_size=block_size,
        max_batch=max_batch,
        max_step_tokens=max_batch + draw(st.integers(0, 24)),
        max_request_tokens=40,
        depth=draw(st.sampled_from([1, 2, 3])),
        prefix_cache=draw(st.booleans()),
        swap_tokens=draw(st.sampled_from([0, 25, 1000])),
    )


@st.composite
def jobs(draw: st.DrawFn) -> list[Job]:
    """Loads with common prefixes, cancellations, failures, priorities and deadlines."""
    stem = tuple(draw(st.lists(st.integers(0, 255), min_size=12, max_size=12)))
    made = []
    for _ in range(draw(st.integers(1, 12))):
        head = stem[: draw(st.integers(0, 12))]
        tail = tuple(draw(st.lists(st.integers(0, 255), min_size=1, max_size=8)))
        cap = draw(st.integers(1, 20))
        made.append(
            Job(
                prompt=head + tail,
                cap=cap,
                length=draw(st.integers(1, 25)),
                arrival_step=draw(st.integers(0, 30)),
                cancel_step=draw(st.none() | st.integers(0, 60)),
                fail_step=draw(st.none() | st.none() | st.integers(0, 40)),
                priority=draw(st.integers(0, 2)),
                on_miss=draw(st.sampled_from(OnMiss)),
                ttft=draw(st.none() | st.floats(1e-3, 0.05)),
                tpot=draw(st.none() | st.floats(1e-3, 0.02)),
                gap=draw(st.none() | st.floats(1e-3, 0.02)),
                e2e=draw(st.none() | st.floats(1e-3, 0.2)),
            )
        )
    return made


@pytest.mark.parametrize("name", NAMES)
@given(machine=machines(), load=jobs(), order=st.sampled_from(ORDERS))
@settings(max_examples=60, deadline=None)
def test_everything_that_always_holds(
    name: str, machine: Capabilities, load: list[Job], order: str
) -> None:
    """Memory, single ends, token order, text independence, and an empty house at the end.

    The engine raises on any plan that it could not carry out.
    """
    check(load, machine, presets.build(name, seed=1, order=order))


@given(machine=machines(), load=jobs(), seed=st.integers(0, 1000), share=st.sampled_from(SHARES))
@settings(max_examples=150, deadline=None)
def test_whatever_rank_and_pack_answer(
    machine: Capabilities, load: list[Job], seed: int, share: str
) -> None:
    """Orders and subsets drawn by lot, so that every entrance and exit of the mechanism is used."""
    whim = Whim(Random(seed))
    check(load, machine, replace(presets.build(share, seed=1), rank=whim, pack=whim))


class Whim:
    """Any order, any subset, and sometimes all."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def rank(self, prompts: Prompts, now: float) -> Ints:
        assert (prompts.left > 0).all()
        assert (prompts.arrival <= now).all()
        rows = list(range(len(prompts.seq)))
        self.random.shuffle(rows)
        return np.array(rows)

    def choose(self, decoding: Decoding, now: float) -> Ints | None:
        count = len(decoding.context)
        assert count > 1
        assert (decoding.generated >= 1).all()
        assert (decoding.first <= decoding.latest).all()
        assert (decoding.latest <= now).all()
        size = self.random.randint(1, count)
        return None if size == count else np.array(self.random.sample(range(count), size))

    def observe(self, load: StepLoad, seconds: float) -> None:
        assert load.decoding or load.prefill
        assert load.decoding <= load.context
        assert load.longest <= load.context
        assert seconds > 0

    def ended(self, length: int) -> None:
        assert length >= 1


def check(load: list[Job], machine: Capabilities, policy: Policy) -> None:
    """Run a load and check what came of it."""
    outcome = run(load, machine, policy)
    assert outcome.ended.keys() == {str(i) for i in range(len(load))}
    for index, job in enumerate(load):
        end = outcome.ended[str(index)]
        text = outcome.texts[str(index)]
        expected = outcome.engine.expected_text(job.work, job.cap)
        assert text == expected[: len(text)]
        assert end.output_tokens == len(text)
        if end.reason in {FinishReason.STOP, FinishReason.LENGTH}:
            assert text == expected
            assert (end.reason is FinishReason.STOP) == (job.length <= job.cap)
        elif end.reason is FinishReason.EXPIRED:
            assert job.on_miss is OnMiss.EXPIRE
        elif end.reason is FinishReason.FAILED:
            assert job.fail_step is not None
        else:
            assert end.reason is FinishReason.CANCELLED
            assert job.cancel_step is not None
    stats = outcome.scheduler.stats(0.0)
    assert stats.kv_used == 0
    assert outcome.engine.used_blocks == stats.kv_idle
    assert outcome.engine.open_requests == 0
    assert outcome.engine.peak_blocks <= machine.kv_blocks


@pytest.mark.parametrize("name", NAMES)
@given(machine=machines(), load=jobs())
@settings(max_examples=20, deadline=None)
def test_same_inputs_give_the_same_plans(name: str, machine: Capabilities, load: list[Job]) -> None:
    first = run(load, machine, policy(name))
    second = run(load, machine, policy(name))
    assert first.engine.plans == second.engine.plans


@pytest.mark.parametrize("name", NAMES)
@given(machine=machines(), load=jobs(), lengths=st.lists(st.integers(1, 25), min_size=12))
@settings(max_examples=20, deadline=None)
def test_no_policy_but_the_oracle_sees_true_lengths(
    name: str, machine: Capabilities, load: list[Job], lengths: list[int]
) -> None:
    """What a policy is told about true lengths changes the oracle's plans only."""

    def plans(told: list[int]) -> list[StepPlan]:
        scheduler = Scheduler(machine, policy(name))
        for index, job in enumerate(load):
            request = Request(str(index), len(job.prompt), job.cap, 0.0)
            scheduler.add(request, true_length=told[index])
        made = []
        for step in range(30):
            plan = scheduler.plan(float(step))
            if plan is None:
                break
            made.append(plan)
            scheduler.confirm(result(plan))
        return made

    if name == "oracle":
        assert plans([job.length for job in load])
    else:
        assert plans([job.length for job in load]) == plans(lengths)
