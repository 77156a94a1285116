"""What vLLM's front end is told of a request that the scheduler ended."""

from __future__ import annotations

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from penstock.vllm.verdict import Verdict


def last_word(request: Request, verdict: Verdict, *, told: bool) -> tuple[int, EngineCoreOutput]:
    """Its last output, and which of vLLM's clients it is for.

    Args:
        told: whether whoever waits understands a verdict.  Else the request ends as an error,
            which no route of vLLM's takes for an answer; ``abort`` some do.
    """
    tokens: list[int] = []
    logprobs: LogprobsLists | None = None
    sampling = request.sampling_params
    streams = sampling is not None and sampling.output_kind == RequestOutputKind.DELTA
    if told and streams and not request.num_output_tokens:
        # A stream leaves out what brings no token before its first one.
        tokens = [0 if sampling.eos_token_id is None else int(sampling.eos_token_id)]
        if sampling.num_logprobs is not None:
            logprobs = _certain(tokens[0], max(0, sampling.num_logprobs))
    return request.client_index, EngineCoreOutput(
        request.request_id,
        tokens,
        new_logprobs=logprobs,
        finish_reason=FinishReason.ABORT if told else FinishReason.ERROR,
        stop_reason=verdict.encode(),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )


def _certain(token: int, alternatives: int) -> LogprobsLists:
    """Log probabilities of a token that was made up: one row."""
    ids = np.full((1, alternatives + 1), token, dtype=np.int32)
    return LogprobsLists(ids, np.zeros(ids.shape, dtype=np.float32), np.ones(1, dtype=np.int32))
