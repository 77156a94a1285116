"""vLLM's scheduler, with every decision made by Penstock's.

vLLM's engine asks three things of a scheduler: take this request, what runs in this step, and
here is what came of it.  :class:`Scheduler` hands the first to the very object that also runs in
Penstock's own server and simulator, writes that object's numbered plan down in vLLM's words for
the second, and for the third lets vLLM's code find out who stopped, and confirms the plan with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from threading import RLock
from typing import Any, NamedTuple, ParamSpec, TypeVar

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.version import __version__ as vllm_version

from penstock.core.gate import gate
from penstock.core.policies import presets
from penstock.core.policies.base import AdmitPolicy, Policy
from penstock.core.scheduler import Scheduler as Core
from penstock.core.types import (
    Ended,
    FinishReason,
    PrefixKey,
    RequestError,
    RequestId,
    StepResult,
)
from penstock.vllm.adapters import AdapterPlaces
from penstock.vllm.blocks import BlockTables
from penstock.vllm.intake import UnservableError, answer_of, as_core, promise_of
from penstock.vllm.last_word import last_word
from penstock.vllm.listening import Standing, serve, stand
from penstock.vllm.memory import KVFacade
from penstock.vllm.pausing import Door
from penstock.vllm.queue import WaitingSet
from penstock.vllm.settings import PluginConfig, read
from penstock.vllm.siblings import Siblings
from penstock.vllm.support import TESTED, capabilities_of, check_supported
from penstock.vllm.tally import Tally
from penstock.vllm.traced import EndsAtLength, trace_length_of
from penstock.vllm.verdict import Verdict
from penstock.vllm.wording import Wording

logger = init_logger("vllm.penstock")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Flight(NamedTuple):
    """A step in flight: what vLLM was told, the plan's number (None: no plan), its beginning."""

    output: SchedulerOutput
    number: int | None
    began: float


def _alone(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """One thread at a time."""

    @wraps(method)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        scheduler: Any = args[0]
        with scheduler.lock:
            return method(*args, **kwargs)

    return alone


class Scheduler(EndsAtLength):
    """What to name after ``--scheduler-cls``; takes what vLLM's schedulers take.

    Raises:
        ValueError: a flag, a model or a setting that it does not support; it names them all.
    """

    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_supported(self.vllm_config, self.kv_cache_config)
        self.settings = read(self.vllm_config.additional_config)
        capabilities = capabilities_of(self.vllm_config, self.kv_cache_config, self.block_size)
        policy = _policy(self.settings, priority=self.scheduler_config.policy == "priority")
        self._door = Door(self._adapter_places(policy.admit))
        self.core = Core(capabilities, replace(policy, admit=self._door))
        self.tables = BlockTables(capabilities.kv_blocks, capabilities.block_size)
        self.kv_cache_manager = KVFacade(
            self.kv_cache_manager,
            lambda: self.core.stats(time.monotonic()).kv_usage,
            self.core.forget_prefixes,
        )
        self.waiting = WaitingSet()
        self._wording = Wording(self)
        self.tally = Tally(self._model_name(), time.monotonic())
        self._siblings = Siblings()
        self._flights: deque[_Flight] = deque()
        self._collected = self._now = 0.0
        # Ended at Penstock's word; told with the next step's outputs.
        self._verdicts: list[tuple[int, EngineCoreOutput]] = []
        # Ended by themselves in the step being collected: keys of full blocks, or a fault.
        self._stopped: dict[RequestId, tuple[PrefixKey, ...]] = {}
        self._capped: dict[RequestId, tuple[PrefixKey, ...]] = {}
        self._failed: dict[RequestId, str] = {}
        # Whoever asks over HTTP does so from another thread.
        self.lock = RLock()
        if self.settings.metrics_port is not None:
            # Of several data-parallel engines each has a port of its own.
            port = self.settings.metrics_port + self.parallel_config.data_parallel_index
            serve(port, self.tally.registry, self.explain)
        self._say_hello()

    @_alone
    def add_request(self, request: Request) -> None:
        """Take a request in; what is wrong with it, or refused, ends with the next step."""
        if request.request_id in self.requests:
            msg = f"request id {request.request_id!r} is in use"
            raise ValueError(msg)
        super().add_request(request)
        # One whose grammar is being compiled enters when that is done.
        if not self._is_blocked_waiting_status(request.status):
            self._enter(request)

    @_alone
    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """What runs in the next step, as Penstock's scheduler plans it."""
        del throttle_prefills  # only data-parallel ranks throttle each other
        self.current_step += 1
        self._let_in_compiled()
        began = time.monotonic()
        plan = self.core.plan(began) if self._may_plan(began) else None
        planning = time.monotonic() - began
        self.tally.step(self.core.stats(began), planning)
        # Before the plan is carried out: none of them is in it.
        self._tell(self.core.take_ended())
        self.core.take_forgotten()
        output = self._wording.of(plan)
        self._flights.append(_Flight(output, None if plan is None else plan.number, began))
        self._update_after_schedule(output)
        return output

    @_alone
    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Write down what came of the oldest step in flight."""
        flight = self._flights.popleft()
        if flight.output is not scheduler_output:
            msg = "vLLM returned a step out of order"
            raise RuntimeError(msg)
        now = self._now = time.monotonic()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if flight.number is not None:
            seconds = now - max(flight.began, self._collected)
            stopped, failed, capped = self._stopped, self._failed, self._capped
            self._stopped, self._failed, self._capped = {}, {}, {}
            self.core.confirm(StepResult(flight.number, seconds, {}, stopped, failed, 1, capped))
            self._tell(self.core.take_ended())
        self._collected = now
        if (line := self.tally.report(now)) is not None:
            logger.info("Penstock: %s", line)
        return self._with_verdicts(outputs)

    @_alone
    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests from outside: the client left, or the front end found a stop string."""
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in ended:
            request_id, sampling = request.request_id, request.sampling_params
            reason, keys = FinishReason.CANCELLED, self._full_blocks(request)
            if finished_status == RequestStatus.FINISHED_ERROR:
                reason = FinishReason.FAILED
                self.tally.judged(request_id, "failed")
            elif sampling is not None and sampling.stop and request.num_output_tokens:
                # vLLM aborts these as well; their length is one to learn from.
                reason = FinishReason.STOP
                self.tally.served(request_id)
            else:
                self.tally.left(request_id)
            self.core.cancel(request_id, reason, keys=keys)
        return ended

    def set_pause_state(self, pause_state: PauseState) -> None:
        """Let nobody in (``PAUSED_NEW``), or plan nothing (``PAUSED_ALL``)."""
        super().set_pause_state(pause_state)
        self._door.closed = pause_state != PauseState.UNPAUSED

    @_alone
    def reset_prefix_cache(
        self,
        reset_running_requests: bool = False,
        reset_connector: bool = False,
    ) -> bool:
        """Forget the prefix cache; False, and nothing done, while a request holds KV memory.

        Args:
            reset_running_requests: evict them first; they compute everything again.
            reset_connector: vLLM's; there is none.

        Raises:
            RuntimeError: they were to be evicted while a step is in flight.
        """
        if reset_running_requests:
            if not self.core.evict_all(time.monotonic()):
                msg = "the prefix cache cannot be reset with running requests in mid-step"
                raise RuntimeError(msg)
            # They may run again in the very next step: workers need their whole texts then.
            self.prev_step_scheduled_req_ids.clear()
        return bool(super().reset_prefix_cache(reset_connector=reset_connector))

    @_alone
    def explain(self, name: str) -> list[Standing]:
        """Where the parts of an open answer stand, and why those wait that do.

        Args:
            name: the answer's id, or the client's own ``X-Request-Id``.
        """
        return stand(name, self.requests.values(), self.core.explain)

    def _let_in_compiled(self) -> None:
        """Hand over those whose grammar is ready."""
        waiting = self.deferred_waiting
        for request in [one for one in waiting if self._handle_blocked_waiting_request(one)]:
            waiting.discard(request)
            self._enter(request)

    def _may_plan(self, now: float) -> bool:
        """Whether vLLM's pause lets anything run."""
        if self._pause_state == PauseState.PAUSED_NEW:
            # With nobody inside, the scheduler lets the first in whatever the policy says.
            return self.core.stats(now).running > 0
        return bool(self._pause_state == PauseState.UNPAUSED)

    def _enter(self, request: Request) -> None:
        """Hand it to the scheduler, or end it with what is wrong: it must not end the engine."""
        try:
            verdict = self._refused(request)
        except UnservableError as error:
            verdict = Verdict("invalid", str(error), error.param)
        except RequestError as error:
            verdict = Verdict("invalid", str(error), error.field)
        except Exception as error:
            logger.exception("Penstock cannot take request %s", request.request_id)
            verdict = Verdict("failed", f"the scheduler cannot take it: {error}")
        if verdict is not None:
            self._end(request, verdict)

    def _refused(self, request: Request) -> Verdict | None:
        """Let it wait, or say why it may not.

        Raises:
            UnservableError, RequestError: it can never be served.
        """
        now = time.monotonic()
        request_id = request.request_id
        over = self._siblings.join(request_id, answer) if (answer := answer_of(request)) else None
        promise = promise_of(request, self.settings.slo)
        length = trace_length_of(request) if self.settings.bench.trace_lengths else None
        arrival = now - max(0.0, time.time() - request.arrival_time)
        one = as_core(
            request, promise, arrival,
            max_model_len=self.max_model_len, block_size=self.block_size,
        )  # fmt: skip
        self.core.validate(one)
        self.tally.taken(request_id, promise, arrival)
        if over is not None:
            return over
        refusal = gate(self.core.stats(now).load, one, self.settings.admission.limits)
        if refusal is not None:
            return Verdict.of_refusal(refusal)
        if length is not None:
            self._end_at(request, length)
        self.core.enter(one, length)
        return None

    def _tell(self, ended: Iterable[Ended]) -> None:
        """End for vLLM those whom Penstock's scheduler ended, and vLLM does not know of it."""
        for end in ended:
            request = self.requests.get(end.id)
            if request is not None:
                self._end(request, Verdict.of_end(end))

    def _end(self, request: Request, verdict: Verdict) -> None:
        """End it, and all who belong to the same answer."""
        others = self._siblings.end(request.request_id, verdict)
        for one in [request, *(self.requests[other] for other in others)]:
            told = self._siblings.told(one.request_id)
            self.tally.judged(one.request_id, verdict.kind)
            self.core.cancel(one.request_id)
            super().finish_requests(one.request_id, RequestStatus.FINISHED_ABORTED)
            self._verdicts.append(last_word(one, verdict, told=told))

    def _with_verdicts(self, outputs: dict[int, EngineCoreOutputs]) -> dict[int, EngineCoreOutputs]:
        verdicts, self._verdicts = self._verdicts, []
        for client, word in verdicts:
            if client not in outputs:
                outputs[client] = EngineCoreOutputs(outputs=[])
            outputs[client].outputs.append(word)
        return outputs

    def _full_blocks(self, request: Request) -> tuple[PrefixKey, ...]:
        """Keys of its full blocks, once all that is planned of it has run."""
        # The KV of the last token is never computed, unless a step too many was planned.
        computed = min(request.num_tokens - 1, request.num_computed_tokens)
        return tuple(request.block_hashes[: computed // self.block_size])

    def _update_request_with_output(
        self,
        request: Request,
        new_token_ids: list[int],
        is_stale: bool = False,
    ) -> tuple[list[int], bool]:
        self.tally.token(request.request_id, self._now)
        return super()._update_request_with_output(request, new_token_ids, is_stale)

    def _handle_stopped_request(self, request: Request) -> bool:
        """Note how it ended: a cap is no news to Penstock's scheduler, all else is."""
        request_id = request.request_id
        if request.status == RequestStatus.FINISHED_ERROR:
            self._failed[request_id] = "its grammar did not take its token"
            self.tally.judged(request_id, "failed")
        elif request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            self._capped[request_id] = self._full_blocks(request)
        else:
            self._stopped[request_id] = self._full_blocks(request)
        self.tally.served(request_id)
        return bool(super()._handle_stopped_request(request))

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._wording.forget(request)
        self._siblings.forget(request.request_id)
        return super()._free_request(request, delay_free_blocks)

    def _adapter_places(self, admit: AdmitPolicy) -> AdmitPolicy:
        """The policy, behind what vLLM's workers ask of LoRA adapters, if there are any."""
        if self.lora_config is None:
            return admit

        def adapter_of(request_id: RequestId) -> int:
            adapter = self.requests[request_id].lora_request
            return 0 if adapter is None else int(adapter.lora_int_id)

        def running() -> list[RequestId]:
            return [request.request_id for request in self.running]

        return AdapterPlaces(admit, self.lora_config.max_loras, adapter_of, running)

    def _model_name(self) -> str:
        """What clients call the model: the first of its names."""
        names = self.vllm_config.model_config.served_model_name
        return str(names if isinstance(names, str) else names[0])

    def _say_hello(self) -> None:
        scheduler = self.settings.scheduler
        logger.info("Penstock schedules: preset %s, %s", scheduler.preset, self.core.capabilities)
        if not vllm_version.startswith(TESTED):
            tested = ", ".join(f"{version}x" for version in TESTED)
            logger.warning(
                "Penstock's plug-in was tested with vLLM %s, this is %s", tested, vllm_version
            )


def _policy(settings: PluginConfig, *, priority: bool) -> Policy:
    """The preset that was asked for.

    Args:
        priority: whether vLLM's own policy is said to be that.

    Raises:
        ValueError: no such preset or parameter, or one that needs what is not there.
    """
    chosen = settings.scheduler
    if chosen.preset == "oracle" and not settings.bench.trace_lengths:
        msg = "preset 'oracle' needs true output lengths: set penstock.bench.trace_lengths"
        raise ValueError(msg)
    order = chosen.order or ("priority" if priority else None)
    parameters: dict[str, Any] = dict(chosen.parameters)
    return presets.build(chosen.preset, seed=chosen.seed, order=order, **parameters)
