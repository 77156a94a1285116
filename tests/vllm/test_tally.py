from __future__ import annotations

from penstock.core.stats import Stats
from penstock.core.types import SLO, OnMiss
from penstock.server.slo import Promise
from penstock.vllm.tally import Tally


def promise(**bounds: float) -> Promise:
    return Promise("chat", SLO(**bounds), OnMiss.KEEP)


def value(tally: Tally, name: str, **labels: str) -> float | None:
    return tally.registry.get_sample_value(f"penstock:{name}", {"model_name": "m", **labels})


def outcome(tally: Tally, what: str) -> float | None:
    return value(tally, "slo_requests_total", slo_class="chat", outcome=what)


def serve(tally: Tally, kept: Promise, *times: float) -> None:
    tally.taken("r", kept, 0.0)
    for now in times:
        tally.token("r", now)
    tally.served("r")


def test_each_bound_is_judged_by_the_tokens_times() -> None:
    for bounds, times, what in [
        ({"ttft": 1.0}, (1.0, 9.0), "met"),
        ({"ttft": 1.0}, (1.1,), "missed"),
        ({"gap": 2.0}, (1.0, 3.0, 5.0), "met"),
        ({"gap": 2.0}, (1.0, 2.0, 4.5), "missed"),
        ({"tpot": 2.0}, (1.0, 2.0, 5.0), "met"),
        ({"tpot": 2.0}, (1.0, 2.0, 5.5), "missed"),
        ({"tpot": 2.0}, (1.0,), "met"),
        ({"e2e": 5.0}, (1.0, 5.0), "met"),
        ({"e2e": 5.0}, (1.0, 5.1), "missed"),
        ({"ttft": 1.0}, (), "missed"),
        ({"gap": 1.0}, (), "met"),
    ]:
        tally = Tally("m", 0.0)
        serve(tally, promise(**bounds), *times)
        assert outcome(tally, what) == 1, (bounds, times)
        goodput = value(tally, "goodput_tokens_total", slo_class="chat")
        assert goodput == (len(times) if what == "met" else None)


def test_refused_is_not_missed_and_neither_is_who_left_or_was_wrong() -> None:
    tally = Tally("m", 0.0)
    for kind in ("refused", "rejected", "expired", "failed", "invalid"):
        tally.taken("r", promise(), 0.0)
        tally.judged("r", kind)  # type: ignore[arg-type]
    tally.taken("gone", promise(), 0.0)
    tally.left("gone")
    tally.served("gone")  # no second outcome
    assert (outcome(tally, "refused"), outcome(tally, "missed")) == (2, 2)
    assert outcome(tally, "met") is None
    assert value(tally, "request_failure_total", reason="invalid") == 1
    assert value(tally, "request_failure_total", reason="cancelled") == 1


def stats(evictions: int) -> Stats:
    return Stats(4, 99, 2, 1, 10, 16, 5, 0, 7, evictions, 3, 2.0)


def test_steps_move_gauges() -> None:
    tally = Tally("m", 0.0)
    tally.step(stats(2), 0.001)
    tally.step(stats(3), 0.002)
    assert value(tally, "num_preemptions_total") == 3
    assert value(tally, "kv_cache_usage_perc") == 0.5
    assert value(tally, "predicted_wait_seconds") == 2.0
    assert value(tally, "planning_seconds_count") == 2


def test_a_line_every_ten_seconds_in_which_somebody_ended() -> None:
    tally = Tally("m", 100.0)
    serve(tally, promise(), 1.0, 2.0)
    assert tally.report(109.0) is None
    serve(tally, promise(ttft=0.5), 1.0)
    tally.step(stats(2), 0.001)
    line = tally.report(110.0)
    assert line == (
        "attainment 50.0 % of 2 requests (1 missed, 0 refused), goodput 0.2 tok/s, 2 evictions"
    )
    assert tally.report(125.0) is None
