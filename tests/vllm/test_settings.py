from __future__ import annotations

import pytest

from penstock.core.types import OnMiss
from penstock.vllm.settings import read


def test_nothing_said_is_past_future_without_a_limit() -> None:
    for nothing in ({}, {"other": 1}, None, {"penstock": {}}):
        config = read(nothing)
        assert config.scheduler.preset == "past-future"
        assert config.admission.limits.max_waiting == 0
        assert not config.bench.trace_lengths
        assert config.metrics_port is None


def test_the_tree_is_that_of_penstocks_own_configuration() -> None:
    config = read(
        {
            "penstock": {
                "scheduler": {"preset": "kairos", "parameters": {"reserve": 0.1}, "seed": 3},
                "admission": {"max_waiting": 5},
                "slo": {"chat": {"ttft": 0.5, "on_miss": "expire"}},
            }
        }
    )
    assert config.scheduler.parameters == {"reserve": 0.1}
    assert config.admission.limits.max_waiting == 5
    assert config.slo["chat"].on_miss is OnMiss.EXPIRE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "kairos"}, r"penstock\.preset is not a setting"),
        ({"scheduler": {"order": "up"}}, r"penstock\.scheduler\.order is 'up'"),
        ({"admission": {"max_waiting": -1}}, r"penstock\.admission\.max_waiting is -1"),
        ({"slo": {"a": {"ttft": 0}}}, r"penstock\.slo\.a\.ttft is 0"),
        ({"metrics_port": 0}, r"penstock\.metrics_port is 0"),
        ("kairos", r"--additional-config: penstock is 'kairos'"),
    ],
)
def test_what_is_wrong_is_named(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({"penstock": given})
