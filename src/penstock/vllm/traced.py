"""Output lengths from a trace, in vLLM: for benchmarks only.

A load generator knows how long each answer was when it was recorded, a scheduler must not.  So
the length travels beside the request (``trace_output_tokens`` in ``SamplingParams.extra_args``),
and the request ends there by itself, like one whose model said so.  :class:`TracedScheduler` is
vLLM's own scheduler with this hook: what Penstock's is compared with.
"""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from penstock.vllm.intake import TRACE, UnservableError, extra_args


def trace_length_of(request: Request) -> int | None:
    """The length it is to have, if it says so.

    Raises:
        UnservableError: it says something else.
    """
    length = extra_args(request).get(TRACE)
    if length is None or (type(length) is int and length >= 1):
        return length
    msg = f"vllm_xargs.{TRACE} is {length!r}; it must be a whole number from 1"
    raise UnservableError(f"vllm_xargs.{TRACE}", msg)


class EndsAtLength(AsyncScheduler):
    """vLLM's scheduler, in which requests can be told their output lengths."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._lengths: dict[str, int] = {}

    def _end_at(self, request: Request, length: int) -> None:
        """From now on it ends there and, its cap aside, nowhere else."""
        self._lengths[request.request_id] = length
        sampling = request.sampling_params
        sampling.stop_token_ids = []
        sampling.ignore_eos = True
        sampling._eos_token_id = None  # noqa: SLF001

    def _update_request_with_output(
        self,
        request: Request,
        new_token_ids: list[int],
        is_stale: bool = False,
    ) -> tuple[list[int], bool]:
        new, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        length = self._lengths.get(request.request_id)
        if length is not None and request.num_output_tokens >= length:
            request.status = RequestStatus.FINISHED_STOPPED
            stopped = True
        return new, stopped

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> object:
        self._lengths.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)


class TracedScheduler(EndsAtLength):
    """vLLM's own scheduler with output lengths from a trace."""

    def add_request(self, request: Request) -> None:
        """Take a request in, and its length."""
        length = trace_length_of(request)
        if length is not None:
            self._end_at(request, length)
        super().add_request(request)
