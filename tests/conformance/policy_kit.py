"""What every policy must do, whatever it decides.

One function per question.  Each takes a factory, so that fresh instances can be compared, and
raises AssertionError with what was wrong.  ``tests/conformance/test_policies.py`` runs them over
everything that is registered; use them for a policy of your own as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isnan
from random import Random

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.policies.base import (
    Admit,
    AdmitPolicy,
    Answer,
    Defer,
    OrderPolicy,
    PackPolicy,
    Policy,
    RankPolicy,
    Reject,
    SharePolicy,
    Split,
    VictimPolicy,
)
from penstock.core.snapshot import Candidate, Columns, Decoding, Ints, Prompts, Snapshot
from penstock.core.types import SLO, Ended, FinishReason, OnMiss, Request
from tests.core.drive import Job, capabilities, run
from tests.core.views import Row, candidate, columns, snapshot

CASES = 40


def check_order_policy(make: Callable[[], OrderPolicy]) -> None:
    """Keys are comparable, without NaN, and depend on the request alone."""
    requests = [_request(Random(case), f"r{case}") for case in range(CASES)]
    first, second = make(), make()
    keys = [first.key(request) for request in requests]
    assert keys == [second.key(request) for request in requests], "two instances disagree"
    assert keys[::-1] == [first.key(request) for request in requests[::-1]], "it remembers"
    for key in keys:
        assert isinstance(key, tuple), f"{key!r} is no tuple"
        assert not any(isnan(part) for part in key), f"{key}"
    assert len({len(key) for key in keys}) == 1, "keys of several lengths"
    later = [first.key(replace(request, arrival=request.arrival + 5)) for request in requests]
    assert all(old <= new for old, new in zip(keys, later, strict=True)), (
        "among equals, who arrives later must not come first, or nobody is sure to be served"
    )


def check_rank_policy(make: Callable[[], RankPolicy]) -> None:
    """Every row once, and the same for the same past."""
    for case in range(CASES):
        prompts = _prompts(Random(case), 2 + case % 30)
        before = [column.tobytes() for column in prompts]
        orders = []
        for _ in range(2):
            policy = make()
            for load, seconds in _steps(case % 4):
                policy.observe(load, seconds)
            orders.append([policy.rank(prompts, 60.0).tolist() for _ in range(3)])
        assert orders[0] == orders[1], f"case {case}: the same past, another order"
        for order in orders[0]:
            assert sorted(order) == list(range(len(prompts.seq))), f"case {case}: {order}"
        assert [column.tobytes() for column in prompts] == before, f"case {case}: it wrote"


def check_pack_policy(make: Callable[[], PackPolicy]) -> None:
    """Rows that are there, each once, at least one; the same for the same past."""
    packed = 0
    for case in range(CASES):
        decoding = _decoding(Random(case))
        before = [column.tobytes() for column in decoding]
        answers = []
        for _ in range(2):
            policy = make()
            for load, seconds in _steps(case):
                policy.observe(load, seconds)
            for length in range(1, 1 + case):
                policy.ended(100 * length)
            chosen = policy.choose(decoding, 100.0)
            answers.append(None if chosen is None else chosen.tolist())
        assert answers[0] == answers[1], f"case {case}: the same past, another subset"
        assert [column.tobytes() for column in decoding] == before, f"case {case}: it wrote"
        rows = answers[0]
        if rows is not None:
            packed += 1
            assert rows, f"case {case}: nobody advances"
            assert len(set(rows)) == len(rows), f"case {case}: {rows}"
            assert set(rows) <= set(range(len(decoding.context))), f"case {case}: {rows}"
    assert packed, "all advance in every case: nothing was tried"


def check_admit_policy(
    make: Callable[[int], AdmitPolicy], *, sees_true_lengths: bool = False
) -> None:
    """Pure, deterministic under a seed, blind to true lengths, and honest about ``holds``.

    Args:
        make: a fresh instance from a seed.
        sees_true_lengths: only for an oracle.
    """
    holds = make(0).holds
    assert holds is None or holds >= 1, f"holds is {holds!r}"
    for case in range(CASES):
        view, queue = _scene(Random(case))
        before = _bytes(view.columns)
        answers = _pass(make(case), view, queue)
        assert answers == _pass(make(case), view, queue), f"case {case}: same seed, other answers"
        assert _bytes(view.columns) == before, f"case {case}: it changed what it looked at"
        _check_answers(answers)
        told = make(case)
        names = [*view.columns.ids, *(one.request.id for one in queue)]
        for name in names:
            told.learn_true_length(name, 1 + case)
        seen = _pass(told, view, queue) != answers
        assert sees_true_lengths or not seen, f"case {case}: true lengths change its answers"
        if holds is None:
            _check_holds(make(case), view, queue[0])
        _check_more_room(make, case, view, queue[0])
    _check_empty_machine(make(0))


def check_share_policy(make: Callable[[], SharePolicy]) -> None:
    """Never more than the step's tokens, always some progress, and no side effects."""
    for case in range(CASES):
        random = Random(case)
        decoding = random.choice([0, 1, 5, 32])
        rows = [_row(random, 4) for _ in range(decoding)]
        view = snapshot(rows, capacity=10_000, block_size=4)
        most = decoding + random.choice([0, 1, 100]) if decoding else random.choice([1, 100])
        before = _bytes(view.columns)
        split = make().split(view, most)
        assert split == make().split(view, most), f"case {case}: the same view, another split"
        assert _bytes(view.columns) == before, f"case {case}: it changed what it looked at"
        assert isinstance(split, Split)
        assert isinstance(split.decode, bool)
        assert isinstance(split.prefill, int)
        assert split.prefill >= 0, f"case {case}: {split}"
        tokens = split.prefill + (view.decoding if split.decode else 0)
        assert 0 < tokens <= most, f"case {case}: {tokens} tokens of at most {most}"


def check_victim_policy(make: Callable[[], VictimPolicy]) -> None:
    """A row that is there; the same for the same columns; down to the last."""
    for case in range(CASES):
        random = Random(case)
        rows = [
            replace(_row(random, 4), seq=seq)
            for seq in random.sample(range(1000), random.randint(1, 20))
        ]
        while rows:
            running = columns(rows)
            before = _bytes(running)
            row = make().choose(running)
            assert isinstance(row, int)
            assert 0 <= row < len(rows), f"case {case}: row {row} of {len(rows)}"
            assert row == make().choose(running), f"case {case}: the same columns, another victim"
            assert _bytes(running) == before, f"case {case}: it changed what it looked at"
            del rows[row]


def check_composition(make: Callable[[], Policy]) -> None:
    """Under a finite load that overflows the memory everyone is served, and all is given back."""
    for depth, prefix_cache in ((1, False), (2, True)):
        random = Random(depth)
        machine = capabilities(
            kv_blocks=15, max_batch=8, max_request_tokens=61, depth=depth, prefix_cache=prefix_cache
        )
        jobs = [
            Job(
                prompt=(1,) * random.randint(1, 30),
                cap=random.randint(1, 30),
                length=random.randint(1, 40),
                arrival_step=random.randint(0, 60),
                priority=random.randint(0, 2),
            )
            for _ in range(40)
        ]
        outcome = run(jobs, machine, make(), max_steps=20_000)
        reasons = {end.reason for end in outcome.ended.values()}
        assert len(outcome.ended) == len(jobs)
        assert reasons <= {FinishReason.STOP, FinishReason.LENGTH}, f"{reasons}"
        assert outcome.scheduler.stats(0.0).kv_used == 0
        assert outcome.engine.plans == run(jobs, machine, make(), max_steps=20_000).engine.plans


def _pass(policy: AdmitPolicy, view: Snapshot, queue: list[Candidate]) -> list[Answer]:
    """One pass, after some ends to learn from."""
    for index, reason in enumerate([*FinishReason] * 10):
        policy.observe(Ended(f"past{index}", reason, 1 + index % 30, 0))
    judge = policy.judge(view)
    answers = []
    for one in queue:
        answers.append(judge(one))
        if isinstance(answers[-1], Defer):
            break
    return answers


def _check_answers(answers: list[Answer]) -> None:
    for answer in answers:
        assert isinstance(answer, Admit | Defer | Reject), f"{answer!r} is no answer"
        if not isinstance(answer, Admit):
            assert answer.reason, "a refusal must say why"


def _check_holds(policy: AdmitPolicy, view: Snapshot, head: Candidate) -> None:
    """``holds`` None: while those who run only grow, a deferral stays a deferral."""
    if not isinstance(policy.judge(view)(head), Defer):
        return
    for steps in (1, 3, 10):
        rows = [
            replace(row, generated=min(row.cap - 1, row.generated + steps)) for row in _rows(view)
        ]
        grown = snapshot(
            rows,
            capacity=view.capacity,
            block_size=view.block_size,
            shared=view.shared,
            lingering=view.lingering,
        )
        answer = policy.judge(grown)(head)
        assert isinstance(answer, Defer), f"deferred, and {steps} steps later: {answer}"


def _check_more_room(
    make: Callable[[int], AdmitPolicy], seed: int, view: Snapshot, head: Candidate
) -> None:
    """Whoever is admitted is admitted if there is more memory, all else being equal."""
    if isinstance(make(seed).judge(view)(head), Admit):
        roomier = view._replace(capacity=view.capacity + 50)
        assert isinstance(make(seed).judge(roomier)(head), Admit), "more room, and no admission"


def _check_empty_machine(policy: AdmitPolicy) -> None:
    answer = policy.judge(snapshot(capacity=10**9))(candidate(10, 10))
    assert isinstance(answer, Admit), f"nothing runs, there is room for millions, and: {answer}"


def _rows(view: Snapshot) -> Iterator[Row]:
    there = view.columns
    for index in range(len(there)):
        yield Row(
            int(there.prompt[index]),
            int(there.generated[index]),
            int(there.cap[index]),
            int(there.shared[index]),
            int(there.lag[index]),
            int(there.seq[index]),
        )


def _scene(random: Random) -> tuple[Snapshot, list[Candidate]]:
    block_size = random.choice([1, 4, 16])
    rows = [_row(random, block_size) for _ in range(random.choice([0, 1, 6, 30]))]
    queue = [
        candidate(
            random.randint(1, 60),
            random.randint(9, 60),
            name=f"q{index}",
            generated=random.choice([0, 0, 0, 8]),
            lag=random.choice([0, 0, 3]),
            block_size=block_size,
            seq=1000 + index,
        )
        for index in range(random.randint(1, 6))
    ]
    used = snapshot(rows, block_size=block_size, shared=2, lingering=1).used
    view = snapshot(
        rows,
        capacity=used + random.choice([random.randint(1, 20), random.randint(20, 1000)]),
        block_size=block_size,
        shared=2,
        lingering=1,
        now=random.uniform(0, 100),
    )
    return view, queue


def _row(random: Random, block_size: int) -> Row:
    prompt, generated = random.randint(1, 60), random.randint(1, 30)
    shared = random.choice([0, 0, (prompt - 1) // block_size * block_size])
    lag = random.choice([0, 0, 0, 2])
    return Row(prompt, generated, generated + random.randint(1, 60), shared, lag)


def _prompts(random: Random, count: int) -> Prompts:
    rows = []
    for seq in random.sample(range(1000), count):
        tokens = random.randint(1, 20_000)
        ttft = random.choice([np.inf, 1.0, 8.0])
        computed, generated = random.randrange(tokens), random.choice([0, 0, 0, 7])
        rows.append((seq, random.uniform(0, 60), ttft, tokens, computed, generated))
    seq, arrival, ttft, tokens, computed, generated = np.array(rows).T
    whole = [column.astype(np.int64) for column in (seq, tokens, computed, generated)]
    return Prompts(whole[0], arrival, ttft, *whole[1:])


def _decoding(random: Random) -> Decoding:
    count = random.randint(2, 40)
    generated = np.array([random.randint(1, 300) for _ in range(count)])
    # Tokens that came at half the pace, just in time, or faster.
    first = 100.0 - generated * random.choice([0.02, 0.04, 0.1])
    pace = np.array([random.choice([np.inf, 0.05, 0.05, 0.2]) for _ in range(count)])
    gap = np.array([random.choice([np.inf, 1.0]) for _ in range(count)])
    latest = np.full(count, 99.97)
    return Decoding(_lengths(random, count), generated, first, latest, pace, gap)


def _lengths(random: Random, count: int) -> Ints:
    return np.array([random.choice([300, 2_000, 8_000, 100_000]) for _ in range(count)])


def _steps(count: int) -> Iterator[tuple[StepLoad, float]]:
    """Decode steps in which the longest context counts, and one prompt now and then."""
    random = Random(count)
    for _ in range(10 * count):
        lengths = _lengths(random, random.randint(1, 40))
        load = StepLoad(len(lengths), int(lengths.sum()), longest=int(lengths.max()))
        yield load, 0.009 + 2.4e-7 * load.longest + 1e-4 * load.decoding
        prefill = random.randint(1, 8192)
        yield StepLoad(0, 0, prefill, prefill * prefill / 2, 1), 5e-5 * prefill


def _request(random: Random, name: str) -> Request:
    return Request(
        name,
        random.randint(1, 5000),
        random.randint(1, 5000),
        random.uniform(0, 1000),
        slo=SLO(ttft=random.choice([None, 0.5, 30.0]), e2e=random.choice([None, 60.0])),
        priority=random.randint(-3, 3),
        on_miss=random.choice(list(OnMiss)),
    )


def _bytes(running: Columns) -> list[bytes]:
    arrays = (running.seq, running.prompt, running.generated, running.cap)
    return [array.tobytes() for array in (*arrays, running.shared, running.lag)]
