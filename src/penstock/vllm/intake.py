"""From vLLM's request to what Penstock's scheduler may know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from penstock.core.types import PrefixKey, Request
from penstock.server.errors import ApiError
from penstock.server.slo import Promise, resolve
from penstock.settings import SLOClass

if TYPE_CHECKING:
    from vllm.v1.request import Request as VllmRequest

SLO_ARGUMENTS = ("slo_class", "slo_ttft_ms", "slo_tpot_ms", "slo_gap_ms", "slo_e2e_ms")
"""Members of ``SamplingParams.extra_args`` (over HTTP: ``vllm_xargs``) that carry a promise."""

TRACE = "trace_output_tokens"
"""The member that carries an output length, where the hook for benchmarks is on."""

ANSWER = "penstock_answer"
"""The member with which the middleware names the HTTP answer that a request is part of."""

CHOICES = "penstock_choices"
"""How many choices each prompt of that answer has."""

CLIENTS_ID = "penstock_clients_id"
"""What the answer's client calls it: its ``X-Request-Id``."""


class UnservableError(ValueError):
    """A request that this scheduler cannot take.  ``param`` names the field at fault."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def extra_args(request: VllmRequest) -> Mapping[str, object]:
    """What its client asked for besides what vLLM knows."""
    sampling = request.sampling_params
    return (sampling.extra_args if sampling is not None else None) or {}


def answer_of(request: VllmRequest) -> str:
    """The HTTP answer that it is part of; empty: nobody understands verdicts."""
    answer = extra_args(request).get(ANSWER)
    return answer if isinstance(answer, str) else ""


def promise_of(request: VllmRequest, classes: Mapping[str, SLOClass]) -> Promise:
    """Its SLO: bounds and class that it named, the rest from the class.

    Raises:
        UnservableError: an unknown class, or a bound that is no number of milliseconds.
    """
    given = extra_args(request)
    body = {name.removeprefix("slo_"): given[name] for name in SLO_ARGUMENTS if name in given}
    try:
        return resolve({}, body, classes)
    except ApiError as error:
        param = (error.param or "").replace("slo.", "vllm_xargs.slo_")
        message = error.message.replace("slo.", "vllm_xargs.slo_")
        raise UnservableError(param, message) from None


def as_core(
    request: VllmRequest,
    promise: Promise,
    arrival: float,
    *,
    max_model_len: int,
    block_size: int,
) -> Request:
    """The request, without its tokens.

    Args:
        arrival: on the scheduler's clock.
        max_model_len: vLLM ends a request that reaches it.
        block_size: of KV; the prompt's full blocks may be shared.

    Raises:
        UnservableError: it is of a kind, or a size, that this scheduler does not serve.
    """
    if request.mm_features:
        raise UnservableError("messages", "images, audio and video are not supported")
    if request.pooling_params is not None:
        raise UnservableError("model", "pooling is not supported")
    if request.resumable:
        raise UnservableError("stream", "streaming input is not supported")
    prompt = request.num_prompt_tokens
    cap = min(request.max_tokens, max_model_len - prompt)
    if cap < 1:
        msg = (
            f"a prompt of {prompt} tokens and max_tokens of {request.max_tokens} leave no room "
            f"for an output token; the model's limit is {max_model_len} in all"
        )
        raise UnservableError("max_tokens", msg)
    return Request(
        request.request_id,
        prompt,
        cap,
        arrival,
        slo=promise.slo,
        slo_class=promise.slo_class,
        priority=request.priority,
        on_miss=promise.on_miss,
        prefix=_prefix(request, prompt // block_size),
    )


def _prefix(request: VllmRequest, blocks: int) -> tuple[PrefixKey, ...]:
    """Keys of the prompt's full blocks: vLLM's own hashes, salt and all."""
    if request.skip_reading_prefix_cache:
        return ()
    return tuple(request.block_hashes[:blocks])
