from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.core.types import SLO, OnMiss
from penstock.settings import SLOClass
from penstock.vllm.intake import UnservableError, as_core, promise_of

CLASSES = {"chat": SLOClass(ttft=0.5, gap=0.2, on_miss=OnMiss.EXPIRE)}


def request(**changes: Any) -> Any:
    sampling = SimpleNamespace(extra_args=changes.pop("extra_args", None))
    made = {
        "request_id": "r",
        "sampling_params": sampling,
        "pooling_params": None,
        "mm_features": [],
        "resumable": False,
        "num_prompt_tokens": 10,
        "max_tokens": 20,
        "priority": 3,
        "skip_reading_prefix_cache": False,
        "block_hashes": [b"a", b"b", b"c"],
    }
    return SimpleNamespace(**{**made, **changes})


def core(one: Any, limit: int = 100) -> Any:
    return as_core(one, promise_of(one, CLASSES), 1.5, max_model_len=limit, block_size=4)


def test_a_request_without_a_promise_has_none() -> None:
    made = core(request())
    assert (made.prompt_tokens, made.cap, made.arrival, made.priority) == (10, 20, 1.5, 3)
    assert made.slo == SLO()
    assert made.prefix == (b"a", b"b")  # the third block is not full of prompt


def test_a_class_and_bounds_of_its_own() -> None:
    given = {"slo_class": "chat", "slo_ttft_ms": 250.0, "other": 1}
    made = core(request(extra_args=given))
    assert made.slo == SLO(ttft=0.25, gap=0.2)
    assert (made.slo_class, made.on_miss) == ("chat", OnMiss.EXPIRE)


def test_the_models_limit_is_a_cap() -> None:
    assert core(request(), limit=15).cap == 5


def test_prompt_logprobs_need_every_token_computed() -> None:
    assert core(request(skip_reading_prefix_cache=True)).prefix == ()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"num_prompt_tokens": 100}, "max_tokens", "100 tokens .* leave no room"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens of 0 leave no room"),
        ({"mm_features": [1]}, "messages", "images, audio and video"),
        ({"pooling_params": 1}, "model", "pooling"),
        ({"resumable": True}, "stream", "streaming input"),
        ({"extra_args": {"slo_class": ["x"]}}, "vllm_xargs.slo_class", "one of: chat, default"),
        ({"extra_args": {"slo_e2e_ms": 10**400}}, "vllm_xargs.slo_e2e_ms", "milliseconds"),
        ({"extra_args": {"slo_class": "x"}}, "vllm_xargs.slo_class", "one of: chat, default"),
        ({"extra_args": {"slo_e2e_ms": "x"}}, "vllm_xargs.slo_e2e_ms", "number of milliseconds"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(UnservableError, match=message) as caught:
        core(request(**changes))
    assert caught.value.param == param
