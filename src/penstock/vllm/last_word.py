"""What vLLM's front end is told of a request that the scheduler ended."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request

from penstock.vllm.verdict import Verdict


def last_word(request: Request, verdict: Verdict, *, told: bool) -> tuple[int, EngineCoreOutput]:
    """Its last output, and which of vLLM's clients it is for.

    Args:
        told: whether whoever waits understands a verdict.  Else the request ends as an error,
            which no route of vLLM's takes for an answer; ``abort`` some do.
    """
    return request.client_index, EngineCoreOutput(
        request.request_id,
        [],
        finish_reason=FinishReason.ABORT if told else FinishReason.ERROR,
        stop_reason=verdict.encode(),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
