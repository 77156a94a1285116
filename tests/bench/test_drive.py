from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from penstock.bench.client import Target
from penstock.bench.drive import HookError, Rules
from penstock.bench.goodput import End
from penstock.bench.measure import Load, Measurement, run
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result
from penstock.bench.workload import SLOClass, Workload, parse_slo
from tests.server.harness import wait_until

if TYPE_CHECKING:
    from conftest import FakeServer


def workload(outputs: list[int], *, slo: tuple[str, ...] = ()) -> Workload:
    lengths = np.array(outputs)
    made = Workload("test", lengths + 1, lengths, arrival=np.arange(len(outputs)) * 0.01)
    return made.with_classes(parse_slo(slo), 0)


def go(fake: FakeServer, requests: Workload, load: Load, **rules: object) -> Result:
    target = Target(fake.url, "fake-model", **rules.pop("target", {}))
    how = Rules(**{"cap": 100, **rules})
    return run(Measurement(target, requests, how, load, Prompts(requests)))


def test_closed_loop_serves_every_request_with_its_own_length(fake: FakeServer) -> None:
    outputs = [1, 2, 3, 5, 8, 13]
    result = go(fake, workload(outputs), Load(clients=2))
    assert sorted(a.output_tokens for a in result.attempts) == outputs
    assert result.summary.requests_met == 6
    assert fake.most_running == 2
    assert all(a.latency.gap is not None for a in result.attempts if a.output_tokens > 1)


def test_the_server_is_told_one_cap_and_the_hook_only(fake: FakeServer) -> None:
    outputs = [2, 4, 6]
    go(fake, workload(outputs), Load(clients=1))
    assert [b["trace_output_tokens"] for b in fake.measured] == outputs
    assert {b["max_tokens"] for b in fake.bodies} == {100}
    assert not any("ignore_eos" in b or "min_tokens" in b or "slo" in b for b in fake.bodies)
    assert [len(b["prompt"]) for b in fake.measured] == [3, 5, 7]


def test_leaking_is_possible_only_when_said_and_is_labelled(fake: FakeServer) -> None:
    result = go(fake, workload([2, 4]), Load(clients=1), lengths="leaked")
    assert [b["max_tokens"] for b in fake.measured] == [2, 4]
    assert all(b["ignore_eos"] for b in fake.measured)
    assert str(result.to_dict()["lengths_label"]).startswith("lengths leaked")


def test_an_endpoint_without_the_hook_is_refused_before_any_load(fake: FakeServer) -> None:
    fake.hook = False
    with pytest.raises(HookError, match="start the server with --trace-lengths"):
        go(fake, workload([2]), Load(clients=1))
    assert len(fake.bodies) == 1


def test_an_endpoint_that_ignores_the_hook_is_refused(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = fake.stream

    def deaf(body: dict[str, object]) -> object:
        body.pop("trace_output_tokens", None)
        return stream(body)

    monkeypatch.setattr(fake, "stream", deaf)
    with pytest.raises(HookError, match="gave 4 output tokens where 3 were asked for"):
        go(fake, workload([2]), Load(clients=1))


def test_the_model_may_decide_the_lengths(fake: FakeServer) -> None:
    requests = replace(workload([9, 9]), output=None)
    result = go(fake, requests, Load(clients=1), lengths="model")
    assert [a.output_tokens for a in result.attempts] == [4, 4]
    assert "trace_output_tokens" not in fake.measured[0]


def test_a_broken_bound_puts_the_request_back_and_costs_goodput(fake: FakeServer) -> None:
    fake.stall_next = 1
    result = go(fake, workload([5, 5, 5], slo=("gap=0.1",)), Load(clients=1))
    assert [(a.request, a.number, a.broken) for a in result.attempts] == [
        (0, 0, ("gap",)),
        (1, 0, ()),
        (2, 0, ()),
        (0, 1, ()),
    ]
    assert result.summary.retries == 1
    assert result.summary.attainment == 0.75
    assert result.summary.goodput_output_tps < result.summary.throughput_output_tps
    assert result.server.evictions == 1
    assert result.attempts[0].latency.gap > 0.2


def test_retries_are_bounded(fake: FakeServer) -> None:
    fake.stall_next = 100
    fake.stall_seconds = 0.03
    result = go(fake, workload([3], slo=("gap=0.01",)), Load(clients=1), retries=2)
    assert [a.number for a in result.attempts] == [0, 1, 2]
    assert result.gave_up == 1
    assert result.summary.requests_met == 0


def test_a_refusal_is_counted_and_its_retry_after_kept(fake: FakeServer) -> None:
    fake.refuse_next, fake.retry_after = 1, "0.3"
    result = go(fake, workload([2]), Load(clients=1))
    first, second = result.attempts
    assert first.end is End.REFUSED
    assert second.met
    assert second.sent - first.ended >= 0.3
    assert result.summary.ends == {"completed": 1, "refused": 1}


@pytest.mark.parametrize(("what", "end"), [("break_next", End.ERROR), ("expire_next", End.EXPIRED)])
def test_a_failed_attempt_is_retried_and_named(fake: FakeServer, what: str, end: End) -> None:
    setattr(fake, what, 1)
    result = go(fake, workload([3]), Load(clients=1))
    assert [a.end for a in result.attempts] == [end, End.COMPLETED]
    if end is End.ERROR:
        assert result.summary.errors == {"ServerError: error in the stream: engine died": 1}


def test_a_client_that_hangs_up_leaves_the_server(fake: FakeServer) -> None:
    fake.first_token_seconds = 5.0
    result = go(fake, workload([3], slo=("ttft=0.1",)), Load(clients=1), patience=0.5, retries=1)
    assert [a.end for a in result.attempts] == [End.ABANDONED, End.ABANDONED]
    assert all(0.04 < a.ended - a.sent < 2.5 for a in result.attempts)
    wait_until(lambda: fake.left == 2)  # the server sees it a little later


def test_hanging_up_ends_with_the_first_token(fake: FakeServer) -> None:
    fake.token_seconds = 0.02
    result = go(fake, workload([10], slo=("ttft=0.1",)), Load(clients=1), patience=1.0)
    assert [a.end for a in result.attempts] == [End.COMPLETED]
    assert result.attempts[0].latency.e2e > 0.15


def test_a_duration_starts_over_and_cuts(fake: FakeServer) -> None:
    # The last two wait when the time is up: a client between two requests would have none to cut.
    fake.token_seconds, fake.silent_after = 0.01, 7
    result = go(fake, workload([4, 5]), Load(clients=2, duration=0.9, warmup=0.5))
    assert sorted(a.request for a in result.attempts) == list(range(8))
    assert [a.end for a in result.attempts] == [End.COMPLETED] * 6 + [End.CUT] * 2
    assert result.summary.seconds == pytest.approx(0.4, abs=0.15)
    assert result.summary.attempts < len(result.attempts) - 2
    prompts = [tuple(b["prompt"]) for b in fake.measured]
    assert len(set(prompts)) == len(prompts)


def test_a_duration_is_kept_when_one_client_reaches_the_end_of_the_workload(
    fake: FakeServer,
) -> None:
    result = go(fake, workload([2, 3]), Load(clients=1, duration=0.5))
    assert max(a.request for a in result.attempts) >= 4
    assert result.summary.seconds >= 0.49  # a timer may fire a little early


def test_open_loop_keeps_its_times_whatever_the_server_does(fake: FakeServer) -> None:
    fake.first_token_seconds = 1.0
    requests = workload([2] * 20, slo=("ttft=0.01",))
    result = go(fake, requests, Load(speed=0.5))
    sent = np.array(sorted(a.sent for a in result.attempts)) - result.start
    assert sent == pytest.approx(np.arange(20) * 0.02, abs=0.2)
    assert fake.most_running > 10
    assert result.summary.retries == 0
    assert result.send_lag_p99 < 0.2


def test_open_loop_can_be_cut(fake: FakeServer) -> None:
    result = go(fake, workload([2] * 200), Load(duration=0.3))
    assert 10 < len(fake.measured) < 60
    # The whole of it would take two seconds; a busy machine may end a little late.
    assert 0.2 < result.summary.seconds < 1


def test_chat_is_driven_with_text(fake: FakeServer) -> None:
    result = go(fake, workload([3]), Load(clients=1), target={"api": "chat"})
    assert result.attempts[0].output_tokens == 3
    assert result.attempts[0].met
    (body,) = fake.measured
    assert len(body["messages"][0]["content"].split()) == 4


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_output_under_either_name(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def think(_: object) -> AsyncIterator[bytes]:
        for delta in ({name: "hm"}, {name: None, "content": "yes"}):
            yield b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    monkeypatch.setattr(fake, "stream", think)
    requests = replace(workload([2]), output=None)
    result = go(fake, requests, Load(clients=1), lengths="model", target={"api": "chat"})
    assert [a.output_tokens for a in result.attempts] == [2]


def test_the_slo_is_sent_when_asked_for(fake: FakeServer) -> None:
    go(fake, workload([1], slo=("ttft=2,gap=0.5",)), Load(clients=1), send_slo=True)
    assert fake.measured[0]["slo"] == {"ttft_ms": 2000.0, "gap_ms": 500.0}


def test_a_mix_of_classes_is_summed_by_class(fake: FakeServer) -> None:
    requests = replace(
        workload([2, 3]),
        classes=(SLOClass("a"), SLOClass("b")),
        class_of=np.array([0, 1]),
    )
    result = go(fake, requests, Load(clients=1))
    assert {name: c.attempts for name, c in result.summary.classes.items()} == {"a": 1, "b": 1}


def test_a_dead_endpoint_is_named() -> None:
    requests = workload([1])
    job = Measurement(
        Target("http://127.0.0.1:9", "m"), requests, Rules(1), Load(1), Prompts(requests)
    )
    with pytest.raises(HookError, match=r"http://127\.0\.0\.1:9/v1/completions does not answer"):
        run(job)


def test_wrong_output_is_an_error_not_a_result(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = fake.stream

    def short(body: dict[str, int]) -> object:
        if len(fake.bodies) > 1:
            body["trace_output_tokens"] -= 1
        return stream(body)

    monkeypatch.setattr(fake, "stream", short)
    result = go(fake, workload([5]), Load(clients=1), retries=0)
    assert result.summary.ends == {"error": 1}
    assert "4 output tokens came instead" in next(iter(result.summary.errors))


def test_a_run_stops_when_enough_have_completed(fake: FakeServer) -> None:
    began = time.monotonic()
    load = Load(clients=2, duration=30.0, completed=5)
    result = go(fake, workload([4, 5]), load)
    assert time.monotonic() - began < 10.0
    ends = [attempt.end for attempt in result.attempts]
    assert ends.count(End.COMPLETED) == 5
    assert len(ends) <= 5 + 2  # those of both clients that were cut


@pytest.mark.parametrize(
    "load", [{"clients": 2}, {"duration": 1.0}, {"clients": 2, "duration": 1.0, "completed": 0}]
)
def test_enough_is_said_with_clients_and_a_duration(load: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"completed is [03]; it must be at least 1, with clients"):
        Load(**{"completed": 3, **load})
