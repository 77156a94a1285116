"""What becomes of a request's sampling parameters."""

from __future__ import annotations

import pytest

from penstock.server.requests import ChatBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def test_what_a_request_leaves_out_is_what_the_model_s_makers_recommend() -> None:
    body = ChatBody.model_validate({**CHAT, "temperature": 1.0, "top_p": None})
    (sampling,) = body.samplings(100, RECOMMENDED)
    assert sampling.temperature == 1.0, "said, though it is OpenAI's default"
    assert sampling.top_p == 0.95
    assert sampling.top_k == 20
    assert sampling.min_p == 0.0


def test_without_a_recommendation_openai_s_defaults_hold() -> None:
    (sampling,) = ChatBody.model_validate(CHAT).samplings(100)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize("seed", [None, 7])
def test_many_choices_share_one_bias(seed: int | None) -> None:
    body = ChatBody.model_validate({**CHAT, "n": 3, "logit_bias": {"5": 1}, "seed": seed})
    samplings = body.samplings(100)
    assert [sampling.seed for sampling in samplings] == ([7, 8, 9] if seed else [None] * 3)
    assert all(sampling.logit_bias is samplings[0].logit_bias for sampling in samplings)
    assert samplings[0].logit_bias == {5: 1.0}
