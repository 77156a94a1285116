"""A plan of Penstock's in the words of vLLM's workers.

Workers keep what they know of a request and are told only what is new: everything of those they
see first, new blocks of the others, and all blocks of those that come back after an eviction.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from penstock.core.types import RequestId, Start, StepPlan
from penstock.vllm.memory import NewBlocks

if TYPE_CHECKING:
    from penstock.vllm.scheduler import Scheduler


@dataclass(slots=True)
class _Step:
    """What is said of one step."""

    new: list[Request] = field(default_factory=list)
    resumed: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    tokens: dict[RequestId, int] = field(default_factory=dict)
    blocks: dict[RequestId, NewBlocks] = field(default_factory=dict)
    fresh: list[int] = field(default_factory=list)


class Wording:
    """Keeps vLLM's side of the books in step with the plans.

    Args:
        scheduler: whose requests, queues and tables they are.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # Started since their last chunk, so that workers have not seen their blocks.
        self._entering: set[RequestId] = set()
        self._known: set[RequestId] = set()

    def forget(self, request: Request) -> None:
        """It has ended; its blocks stay until a plan drops them."""
        self._entering.discard(request.request_id)
        self._known.discard(request.request_id)

    def of(self, plan: StepPlan | None) -> SchedulerOutput:
        """Carry a plan out on vLLM's side, and say it; None: nothing runs."""
        step = _Step()
        if plan is not None:
            now = time.monotonic()
            for drop in plan.drops:
                if not drop.final:
                    self._evict(drop.id, now)
            self._scheduler.tables.apply(plan)
            for start in plan.starts:
                self._start(start, now)
            for request_id in plan.decode:
                self._add(step, request_id, 1)
            for chunk in plan.chunks:
                request = self._add(step, chunk.id, chunk.tokens)
                assert request.num_computed_tokens == chunk.start, (request, chunk)
                self._scheduler.tables.publish(chunk.id, chunk.publish)
        return self._say(step)

    def _evict(self, request_id: RequestId, now: float) -> None:
        scheduler = self._scheduler
        request = scheduler.requests[request_id]
        scheduler.running.remove(request)
        scheduler._preempt_request(request, now)  # noqa: SLF001
        # Behind a shared beginning it may start again in this very plan: workers need its text.
        scheduler.prev_step_scheduled_req_ids.discard(request_id)

    def _start(self, start: Start, now: float) -> None:
        scheduler = self._scheduler
        request = scheduler.requests[start.id]
        cached = len(start.cached) * scheduler.block_size
        scheduler.waiting.remove_request(request)
        scheduler.running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = cached
        self._entering.add(start.id)
        if scheduler.cache_config.enable_prefix_caching and not request.skip_reading_prefix_cache:
            scheduler.kv_cache_manager.record(request, cached)
        if request.prefill_stats is not None and not request.num_preemptions:
            request.prefill_stats.set(request.num_tokens, cached, 0)
        if scheduler.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED, now)

    def _add(self, step: _Step, request_id: RequestId, tokens: int) -> Request:
        """It computes so many tokens in this step."""
        scheduler = self._scheduler
        request: Request = scheduler.requests[request_id]
        fresh = scheduler.tables.grow(request_id, request.num_computed_tokens + tokens)
        step.fresh += fresh
        step.tokens[request_id] = tokens
        if request_id not in self._entering:
            step.running.append(request)
            step.blocks[request_id] = NewBlocks(fresh)
            return request
        self._entering.remove(request_id)
        step.blocks[request_id] = NewBlocks(scheduler.tables.numbers(request_id))
        # The second model runner forgets those that were preempted.
        back = request_id in self._known and not scheduler.use_v2_model_runner
        (step.resumed if back else step.new).append(request)
        self._known.add(request_id)
        return request

    def _say(self, step: _Step) -> SchedulerOutput:
        scheduler = self._scheduler
        second = scheduler.use_v2_model_runner
        new = [
            NewRequestData.from_request(
                request,
                step.blocks[request.request_id].get_block_ids(),
                request._all_token_ids if second else None,  # noqa: SLF001
            )
            for request in step.new
        ]
        cached = scheduler._make_cached_request_data(  # noqa: SLF001
            step.running, step.resumed, step.tokens, {}, step.blocks
        )
        if not second:
            scheduler.prev_step_scheduled_req_ids = set(step.tokens)
        # Not by its constructor, which takes other arguments in every version of vLLM.
        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs = new
        output.scheduled_cached_reqs = cached
        output.num_scheduled_tokens = step.tokens
        output.total_num_scheduled_tokens = sum(step.tokens.values())
        output.num_common_prefix_blocks = [0]
        output.preempted_req_ids = scheduler.reset_preempted_req_ids
        output.finished_req_ids = scheduler.finished_req_ids
        output.new_block_ids_to_zero = step.fresh if scheduler.needs_kv_cache_zeroing else None
        return output
