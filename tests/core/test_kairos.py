"""Kairos's orders and batches: the paper's pseudo-code, its worked example, and the repairs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.longest import LongestBound
from penstock.core.forecast.prompt_time import LengthAware, RunningRate
from penstock.core.memory import prefix_keys
from penstock.core.policies import presets
from penstock.core.policies.order.ranks import (
    AgedShortest,
    EarliestDeadline,
    LeastLaxity,
    ShortestPrefill,
)
from penstock.core.policies.order.urgency import Urgency
from penstock.core.policies.order.urgency_literal import UrgencyLiteral
from penstock.core.policies.pack.slack import Slack
from penstock.core.policies.pack.slack_literal import SlackLiteral, step_table
from penstock.core.scheduler import Scheduler
from penstock.core.snapshot import Decoding, Prompts
from penstock.core.types import Capabilities, Request
from tests.core.drive import capabilities, result
from tests.core.hand import Hand

K = 1024
MACHINE = LongestBound(9e-3, 1e-4, 2.38e-7, 7e-9, 4.766e-5, 2.972e-10)


def prompts(
    tokens: list[int],
    *,
    arrival: list[float] | None = None,
    ttft: float = 8.0,
    computed: list[int] | None = None,
    generated: list[int] | None = None,
) -> Prompts:
    count = len(tokens)
    nothing = [0] * count
    return Prompts(
        np.arange(count),
        np.array(arrival or nothing, dtype=np.float64),
        np.full(count, ttft),
        np.array(tokens),
        np.array(computed or nothing),
        np.array(generated or nothing),
    )


def rated(tokens: int, seconds: float) -> RunningRate:
    rate = RunningRate()
    rate.observe(StepLoad(0, 0, tokens, 0.0, 1), seconds)
    return rate


@pytest.mark.parametrize(
    ("long", "expected"),
    [
        # The paper's own story: all four are late, and the longest is picked.
        (128 * K, [0, 1, 2, 3]),
        # 96K in front: short, short, long, short.
        (96 * K, [1, 2, 0, 3]),
        (64 * K, [1, 2, 3, 0]),
    ],
)
def test_the_printed_score_is_computed_as_printed(long: int, expected: list[int]) -> None:
    order = UrgencyLiteral(rated(14_895, 1.0)).rank(prompts([long, 8 * K, 8 * K, 8 * K]), 0.0)
    assert order.tolist() == expected


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 10_000), st.floats(0, 50), st.floats(0.1, 20)), min_size=1
    ),
    rate=st.integers(100, 10_000),
)
def test_the_printed_score_is_the_pseudo_code(
    rows: list[tuple[int, float, float]], rate: int
) -> None:
    rows = sorted(rows, key=lambda row: row[1])
    tokens, arrival, ttft = (list(column) for column in zip(*rows, strict=True))
    queue = prompts(tokens, arrival=arrival)._replace(ttft=np.array(ttft))
    order = UrgencyLiteral(rated(rate, 1.0)).rank(queue, 60.0).tolist()
    scores = []
    for r, (length, came, promised) in enumerate(rows):
        finish = 60.0
        for other, arrived, _ in rows[: r + 1]:
            finish = max(finish, arrived) + other / rate
        slack = promised - (finish - came)
        scores.append(slack / promised / length)
    for before, after in pairwise(order):
        assert scores[before] >= scores[after] - 1e-9 * abs(scores[after])


def in_time(order: tuple[int, ...], seconds: list[float], deadline: list[float]) -> int:
    end, count = 0.0, 0
    for row in order:
        end += seconds[row]
        count += end <= deadline[row]
    return count


@given(
    jobs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=6),
)
def test_urgency_has_the_most_prompts_in_time(jobs: list[tuple[int, int]]) -> None:
    tokens, deadline = [a * 100 for a, _ in jobs], [float(b) for _, b in jobs]
    queue = prompts(tokens)._replace(ttft=np.array(deadline))
    order = tuple(Urgency(time=rated(100, 1.0)).rank(queue, 0.0).tolist())
    seconds = [float(a) for a, _ in jobs]
    best = max(in_time(one, seconds, deadline) for one in permutations(range(len(jobs))))
    assert in_time(order, seconds, deadline) == best


def test_those_who_have_output_come_first_the_short_before_the_long() -> None:
    queue = prompts([900, 500, 40, 300], generated=[0, 3, 0, 3], arrival=[0, 1, 2, 3])
    urgency = Urgency(time=rated(1, 1.0))
    assert urgency.rank(queue, 10.0).tolist()[:2] == [3, 1]
    assert urgency.rank(queue, 31.5).tolist()[:2] == [1, 3], "who came 30 s ago has its turn"
    others = queue._replace(seq=np.array([0, 9, 2, 3]))  # it has got its memory
    assert urgency.rank(others, 33.5).tolist()[:2] == [3, 1], "and the next one not at once"
    assert urgency.rank(others, 35.0).tolist()[:2] == [3, 1], "of two that are due, the older"


def test_a_hopeless_prompt_ends_however_many_short_ones_come() -> None:
    urgency = Urgency(time=rated(1000, 1.0))
    left, steps = 50_000, 0
    while left > 0:
        queue = prompts([50_000, 1000, 1000, 1000], computed=[50_000 - left, 0, 0, 0])
        queue = queue._replace(arrival=np.array([0.0, *[float(steps)] * 3]))
        if urgency.rank(queue, float(steps))[0] == 0:
            left -= 1000
        steps += 1
        assert steps <= 500, "one step in ten is its own"
    assert steps > 400, "and not more"


def test_the_orders_that_kairos_is_compared_with() -> None:
    queue = prompts([500, 100, 900, 20], arrival=[0, 1, 2, 3], computed=[450, 0, 0, 0])
    queue = queue._replace(ttft=np.array([9.0, 7.0, 2.0, np.inf]), generated=np.array([0, 0, 0, 1]))
    now = 4.0
    assert ShortestPrefill().rank(queue, now).tolist() == [3, 1, 0, 2]
    assert EarliestDeadline().rank(queue, now).tolist() == [3, 2, 1, 0]
    # Laxities: 9 - 0.5, 8 - 1, 4 - 9.
    assert LeastLaxity(rated(100, 1.0)).rank(queue, now).tolist() == [3, 2, 1, 0]
    # The weights are 1 + 4/9, 1 + 3/7 and 2; tokens left are 50, 100 and 900.
    assert AgedShortest().rank(queue, now).tolist() == [3, 0, 1, 2]


def test_prompt_times_follow_the_square_where_asked() -> None:
    aware, rate = LengthAware(), RunningRate()
    for start, tokens in ((0, 8192), (8192, 8192), (65_536, 8192), (0, 512)):
        work = tokens * (start + tokens / 2)
        load = StepLoad(0, 0, tokens, work, 1)
        for each in (aware, rate):
            each.observe(load, MACHINE.seconds(load))
    long = np.array([0]), np.array([128 * K])
    assert aware.seconds(*long)[0] == pytest.approx(8.8, rel=0.01)
    assert rate.seconds(*long)[0] < 8.0


def literal_batch(lengths: list[int], slack: list[float], step: object) -> list[int]:
    """Algorithm 3, as printed, given the slacks."""
    least = min(slack)
    batch: list[int] = []
    current = 0.0
    for row in sorted(range(len(lengths)), key=lambda r: lengths[r]):
        seconds = step(len(batch) + 1, lengths[row])  # type: ignore[operator]
        if seconds <= least and (not batch or (len(batch) + 1) / seconds > len(batch) / current):
            batch.append(row)
            current = seconds
    return batch or list(range(len(lengths)))


def decoding(lengths: list[int], generated: list[int], ages: list[float], pace: float) -> Decoding:
    """At time 100; first tokens came ``ages`` before."""
    count = len(lengths)
    return Decoding(
        np.array(lengths),
        np.array(generated),
        100.0 - np.array(ages),
        np.full(count, 99.99),
        np.full(count, pace),
        np.full(count, np.inf),
    )


@given(
    rows=st.lists(
        st.tuples(st.integers(100, 130_000), st.integers(1, 100), st.floats(0, 4)),
        min_size=2,
        max_size=12,
    )
)
def test_literal_batches_are_those_of_algorithm_3(rows: list[tuple[int, int, float]]) -> None:
    lengths, generated, ages = (list(column) for column in zip(*rows, strict=True))
    table = step_table(MACHINE)
    slack = [0.05 * count - age - table.step(1, length) for length, count, age in rows]
    chosen = SlackLiteral(0.05, table).choose(decoding(lengths, generated, ages, 0.05), 100.0)
    found = sorted(range(len(rows)) if chosen is None else chosen.tolist())
    assert found == sorted(literal_batch(lengths, slack, table.step))


def test_one_hopeless_straggler_stops_the_printed_rule_and_not_the_repaired_one() -> None:
    lengths = [2_000] * 10 + [100_000]
    view = decoding(lengths, [40] * 11, [1.0] * 10 + [60.0], 0.05)
    assert SlackLiteral(0.05, step_table(MACHINE)).choose(view, 100.0) is None
    repaired = learned(Slack())
    for length in range(50, 150):
        repaired.ended(length)
    chosen = repaired.choose(view, 100.0)
    assert chosen is not None
    assert sorted(chosen.tolist()) == list(range(10))


def learned(slack: Slack) -> Slack:
    """With the prices of :data:`MACHINE`."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        lengths = rng.choice([500, 2_000, 8_000, 30_000, 128_000], rng.integers(1, 60))
        load = StepLoad(len(lengths), int(lengths.sum()), longest=int(lengths.max()))
        slack.observe(load, MACHINE.seconds(load))
    for length in range(50, 1500):
        slack.ended(length)
    return slack


@given(
    lengths=st.lists(
        st.sampled_from([500, 2_000, 8_000, 30_000, 120_000]), min_size=2, max_size=20
    ),
    gap=st.sampled_from([None, 0.1]),
)
@settings(max_examples=20, deadline=None)
def test_whoever_sits_out_keeps_the_pace_and_the_gap(lengths: list[int], gap: float | None) -> None:
    """Where a step of all fits the pace, nobody falls behind, and most are faster than in step."""
    slack = learned(Slack())
    now, count = 100.0, len(lengths)
    generated, latest = np.ones(count, dtype=np.int64), np.full(count, now)
    lengths_ = np.array(lengths)
    for _ in range(150):
        context = lengths_ + generated
        bound = np.full(count, np.inf if gap is None else gap)
        view = Decoding(
            context, generated, np.full(count, 100.0), latest, np.full(count, 0.06), bound
        )
        chosen = slack.choose(view, now)
        rows = np.arange(count) if chosen is None else chosen
        load = StepLoad(len(rows), int(context[rows].sum()), longest=int(context[rows].max()))
        now += MACHINE.seconds(load)
        if gap is not None:
            assert (now - latest[rows]).max() <= gap + 1e-3
        generated, latest = generated.copy(), latest.copy()
        generated[rows] += 1
        latest[rows] = now
    assert (latest - 100.0 <= 0.06 * (generated - 1)).all()
    short = lengths_[lengths_ < lengths_.max()]
    if len(short):
        full = MACHINE.seconds(StepLoad(count, int(lengths_.sum()), longest=int(lengths_.max())))
        quick = MACHINE.seconds(StepLoad(len(short), int(short.sum()), longest=int(short.max())))
        if len(short) / quick > 1.2 * count / full:
            assert generated[lengths_ < lengths_.max()].max() * full > 1.05 * (now - 100.0)


def test_the_pace_counts_from_the_first_token_wherever_that_came() -> None:
    """A request that was handed over has been waiting since its first token."""

    class Looking:
        def __init__(self) -> None:
            self.first: list[float] = []

        def choose(self, decoding: Decoding, now: float) -> None:
            assert now == 12.0
            self.first = decoding.first.tolist()

        def observe(self, load: StepLoad, seconds: float) -> None:
            """Nothing to learn."""

        def ended(self, length: int) -> None:
            """Nothing to learn."""

    looking = Looking()
    policy = replace(presets.build("vllm"), pack=looking)
    scheduler = Scheduler(Capabilities(100, 1, 8, 64, 200), policy)
    scheduler.add(Request("here", 10, 20, 9.0))
    scheduler.add(Request("from elsewhere", 10, 20, 1.0, generated=1, computed=10, first_token=3.5))
    plan = scheduler.plan(11.0)
    assert plan is not None
    scheduler.confirm(result(plan))
    scheduler.plan(12.0)
    assert sorted(looking.first) == [3.5, 12.0]


def test_nobody_is_packed_before_step_times_are_known() -> None:
    view = decoding([100, 90_000], [50, 50], [1.0, 1.0], 0.05)
    assert Slack().choose(view, 100.0) is None


def test_learned_step_times_tell_the_longest_from_the_sum() -> None:
    slack = learned(Slack())
    for rows in combinations([700, 3_000, 3_000, 90_000], 3):
        contexts = np.array(rows)
        load = StepLoad(3, int(contexts.sum()), longest=int(contexts.max()))
        assert slack.steps.seconds(contexts) == pytest.approx(MACHINE.seconds(load), rel=0.02)


@pytest.mark.parametrize(
    ("preset", "parameters", "message"),
    [
        ("kairos", {"lost_share": 0.0}, "lost_share is 0"),
        ("kairos", {"margin": 1.0}, "margin is 1"),
        ("kairos", {"stretch": 0.5}, "stretch is 0.5"),
        ("kairos", {"tpot": 0.0}, "tpot is 0"),
        ("kairos-literal", {"tpot": -1.0}, "tpot is -1"),
        ("kairos", {"length_aware": 2}, "length_aware is 2"),
        ("distserve", {"margin": 0.1}, "no parameter 'margin'"),
    ],
)
def test_parameters_out_of_range(preset: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.build(preset, **parameters)  # type: ignore[arg-type]


def test_a_cached_prefix_counts_for_who_waits() -> None:
    """Of 40 tokens 36 are in the cache, so that prompt is shorter than one of 20."""
    machine = capabilities(
        kv_blocks=40, block_size=4, max_request_tokens=80, max_step_tokens=40, prefix_cache=True
    )
    keys = tuple(prefix_keys(tuple(range(40)), 4))
    hand = Hand(machine, presets.build("distserve", order="aged-shortest"))
    hand.add("first", 40, 1, prefix=keys)
    hand.finish()
    hand.add("medium", 20, 1)
    hand.add("long", 40, 1, prefix=keys)
    assert [start.id for start in hand.step().starts] == ["long", "medium"]
