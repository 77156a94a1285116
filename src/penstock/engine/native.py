"""The native engine: Hugging Face models on PyTorch behind the Engine interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.engine import KV, Ticket, Work
from penstock.core.memory import prefix_keys
from penstock.core.types import (
    Capabilities,
    PrefixKey,
    RequestError,
    RequestId,
    StepPlan,
    StepResult,
    Token,
)
from penstock.engine import handoff
from penstock.engine.endings import Endings
from penstock.engine.errors import PlanError
from penstock.engine.handoff import LayerKV
from penstock.engine.limits import plan_capabilities
from penstock.engine.loading import LoadedModel, load_model
from penstock.engine.rows import Ints, Rows, Tokens
from penstock.engine.runner import Runner
from penstock.engine.sampler import Sampler
from penstock.engine.sizing import check_settings
from penstock.engine.steps import Step, Steps


@dataclass(slots=True)
class _Opened:
    """A request's payload; ``tokens`` are those it had when it last lost its row."""

    work: Work
    tokens: Tokens


class NativeEngine:
    """Runs plans on a Hugging Face model, one at a time; see :class:`penstock.core.engine.Engine`.

    Args:
        model: what to run.
        capabilities: what it shall be able to do; the KV memory is taken at once.
        kv_on_device: whether :meth:`take_kv` copies to the model's device, not to host memory.

    Attributes:
        capabilities: as given.
        eos_ids: tokens at which the model ends by itself.
        vocab_size: width of the model's logits; output tokens are below this.
        model_type: the model's architecture, as Hugging Face names it.
        parameters: how many parameters the model has.

    Raises:
        ValueError: more than one plan is to be in flight.
        UnsupportedModelError: the model cannot be run after all.
    """

    def __init__(
        self, model: LoadedModel, capabilities: Capabilities, *, kv_on_device: bool = False
    ) -> None:
        if capabilities.depth != 1:
            msg = f"capabilities.depth is {capabilities.depth}; this engine is synchronous: 1"
            raise ValueError(msg)
        self.capabilities = capabilities
        self.eos_ids = model.eos_ids
        self.vocab_size = model.vocab_size
        self.model_type: str = model.config.model_type
        self.parameters = model.parameters
        self._tokens_in = model.tokens_in
        self._kv_on_device = kv_on_device
        self._rows = Rows(capabilities)
        self._endings = Endings(capabilities.max_batch, model.vocab_size, model.eos_ids)
        self._sampler = Sampler(model.device, model.vocab_size)
        self._opened: dict[RequestId, _Opened] = {}
        self._steps = Steps(self._rows, capabilities.block_size)
        self._result: StepResult | None = None
        self._last_plan = 0
        # Prefix keys that the scheduler counts as cached, but whose blocks were never computed
        # because their step failed; and the requests that were to begin with one of them.
        self._lost: set[PrefixKey] = set()
        self._broken: dict[RequestId, str] = {}
        # Last: nobody could close a half-made engine, which the model would stay with.
        self._runner = Runner(model, capabilities.kv_blocks, capabilities.block_size)

    @classmethod
    def load(  # noqa: PLR0913 - each is a setting of its own
        cls,
        model: str,
        *,
        kv_tokens: int | None = None,
        block_size: int = 16,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        max_request_tokens: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        prefix_cache: bool = True,
        swap_tokens: int = 0,
        threads: int | None = None,
        memory_share: float = 1.0,
        kv_on_device: bool = False,
    ) -> NativeEngine:
        """Load a model and take KV memory for it.

        Args:
            model: a folder, a name on the Hugging Face hub, or ``demo``.
            kv_tokens, block_size: KV memory, and its blocks, in tokens; None: a share of the free.
            max_batch, max_step_tokens: most requests, and most tokens computed, in one step.
            max_request_tokens: most prompt plus output tokens of one; None: the model's limit.
            dtype, device: ``auto``, or ``float32``, ``bfloat16``, ``float16``; ``cpu``, ``cuda:N``.
            prefix_cache: whether requests may share the KV of equal beginnings.
            swap_tokens: tokens of evicted requests' KV that are kept in host memory.
            threads: CPU threads of this process; None: PyTorch's choice.
            memory_share: of the memory for KV where ``kv_tokens`` is None, in (0, 1].
            kv_on_device: see the class.

        Raises:
            CheckpointError, UnsupportedModelError: the model cannot be loaded, or not be run.
            ValueError: a setting is out of range.
        """
        check_settings(block_size, threads, memory_share)
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load_model(model, dtype=dtype, device=device)
        capabilities = plan_capabilities(
            loaded,
            kv_tokens=kv_tokens, block_size=block_size, max_batch=max_batch,
            max_step_tokens=max_step_tokens, max_request_tokens=max_request_tokens,
            prefix_cache=prefix_cache, swap_tokens=swap_tokens, memory_share=memory_share,
        )  # fmt: skip
        return cls(loaded, capabilities, kv_on_device=kv_on_device)

    def open(self, request_id: RequestId, work: Work) -> None:
        """Take in a request's payload.

        Raises:
            RequestError: the prompt is empty, or a token is not in the model's vocabulary.
        """
        if request_id in self._opened:
            msg = f"request id {request_id!r} is in use"
            raise RequestError("id", msg)
        if work.trace_length is not None and work.trace_length < 1:
            msg = f"trace_length is {work.trace_length}; it must be at least 1"
            raise RequestError("trace_length", msg)
        prompt = self._checked("prompt", work.prompt)
        if not len(prompt):
            msg = "the prompt is empty; it must have at least one token"
            raise RequestError("prompt", msg)
        self._checked("stop_token_ids", work.sampling.stop_token_ids)
        generated = self._checked("generated", work.generated)
        if work.kv is not None:
            self._check_kv(work.kv, len(prompt) + len(generated))
        self._sampler.open(request_id, work.prompt, work.sampling, work.generated)
        self._opened[request_id] = _Opened(work, np.concatenate((prompt, generated)))

    def discard(self, request_id: RequestId) -> None:
        """Forget a payload that has no KV; nothing happens if it is forgotten already.

        Raises:
            PlanError: it has KV.
        """
        if request_id in self._rows:
            msg = f"request {request_id} is discarded but has KV"
            raise PlanError(msg)
        if self._opened.pop(request_id, None) is not None:
            self._sampler.close(request_id)

    def take_kv(
        self, request_id: RequestId, start: int = 0, end: int | None = None
    ) -> LayerKV | None:
        """A copy of a request's KV; None if it has none, or a step lost it."""
        return self._copy(request_id, start, end, to_host=not self._kv_on_device)

    def _copy(
        self, request_id: RequestId, start: int, end: int | None, *, to_host: bool
    ) -> LayerKV | None:
        if request_id not in self._rows or request_id in self._broken:
            return None
        row = self._rows.row(request_id)
        blocks, computed = self._rows.blocks(row), int(self._rows.computed[row])
        if end is not None and computed < end:
            return None
        end = computed if end is None else end
        return handoff.export(self._runner.layers, blocks, start, end, to_host=to_host)

    def submit(self, plan: StepPlan) -> Ticket:
        """Run a step; it is done when this returns.

        Raises:
            PlanError: the plan breaks the protocol, or needs more KV blocks than there are.
            RuntimeError: the model fails, whatever it is given.
        """
        if self._result is not None or plan.number != self._last_plan + 1:
            msg = f"plan {plan.number} follows plan {self._last_plan}, which must be collected"
            raise PlanError(msg)
        began = time.perf_counter()
        self._last_plan = plan.number
        self._apply(plan)
        tokens: dict[RequestId, Token] = {}
        stopped: dict[RequestId, tuple[PrefixKey, ...]] = {}
        failed = dict(self._broken)
        if plan.tokens:
            step = self._plan_step(plan)
            if step is not None:
                self._compute(step, tokens, stopped, failed)
        # By themselves rather than by their cap, if both at once.
        capped = {
            name: self._keys(self._rows.row(name))
            for name in plan.capped
            if name in tokens and name not in stopped
        }
        seconds = time.perf_counter() - began
        self._result = StepResult(plan.number, seconds, tokens, stopped, failed, capped=capped)
        return Ticket(plan.number)

    def collect(self, ticket: Ticket) -> StepResult:
        """The result of the step that was submitted last.

        Raises:
            PlanError: there is none of this number.
        """
        result = self._result
        if result is None or result.number != ticket.number:
            msg = f"there is no result of plan {ticket.number}"
            raise PlanError(msg)
        self._result = None
        return result

    def close(self) -> None:
        """Give the KV memory back, and the model's unless someone else has it.  Idempotent."""
        self._runner.close()
        self._opened.clear()
        self._result = None

    def check(self) -> None:
        """Raise AssertionError if block tables and reference counts contradict each other."""
        self._rows.check()

    def _checked(self, field: str, tokens: Sequence[int]) -> Tokens:
        """Token ids as an array, if the model knows them all."""
        array = np.asarray(tokens)
        if not len(array):
            return np.empty(0, dtype=np.int32)
        limit = self._tokens_in
        if array.ndim != 1 or array.dtype.kind not in "iu":
            msg = f"{field} must be a sequence of whole numbers, not {array.dtype}"
            raise RequestError(field, msg)
        wrong = (array < 0) | (array >= limit)
        if wrong.any():
            place = int(wrong.argmax())
            msg = (
                f"{field}[{place}] is {array[place]}; token ids of this model are 0 to {limit - 1}"
            )
            raise RequestError(field, msg)
        return array.astype(np.int32)

    def _apply(self, plan: StepPlan) -> None:
        """The bookkeeping of a plan: who leaves, what is forgotten, who enters."""
        for drop in plan.drops:
            row = self._rows.row(drop.id)
            for index, key in drop.publish:
                self._rows.publish(row, index, key)
            if drop.swapped:
                opened = self._opened[drop.id]
                kv = self._copy(drop.id, 0, drop.swapped, to_host=True)
                opened.work = opened.work._replace(kv=kv)
            tokens = self._rows.drop(drop.id)
            self._broken.pop(drop.id, None)
            if drop.final:
                self.discard(drop.id)
            else:
                self._opened[drop.id].tokens = tokens
        for key in plan.forget:
            if key in self._lost:
                self._lost.remove(key)
            else:
                self._rows.pool.forget(key)
        if plan.drops:
            self._rows.check_idle()
        for start in plan.starts:
            self._start(start.id, start.tokens, start.cached)
            if start.imported:
                self._import(start.id, start.imported)

    def _import(self, request_id: RequestId, tokens: int) -> None:
        """Write the KV that a request brings into its blocks, and keep it no longer."""
        opened = self._opened[request_id]
        kv = opened.work.kv
        if not isinstance(kv, LayerKV) or kv.tokens < tokens:
            there = kv.tokens if kv is not None else 0
            msg = f"request {request_id} starts with KV of {tokens} tokens; it brings {there}"
            raise PlanError(msg)
        opened.work = opened.work._replace(kv=None)
        start, blocks = self._rows.bring(self._rows.row(request_id), tokens)
        if start < tokens:  # others may have shared more meanwhile than it brings
            # A lost shared block was to be its beginning; what it brings has that too.
            self._broken.pop(request_id, None)
            handoff.bring_in(self._runner.layers, blocks, start, tokens, kv)

    def _check_kv(self, kv: KV, tokens: int) -> None:
        if not isinstance(kv, LayerKV):
            msg = f"kv is {type(kv).__name__}; it must come from an engine of this kind"
            raise RequestError("kv", msg)
        if kv.tokens >= tokens:
            msg = f"kv is of {kv.tokens} tokens; the request has {tokens}, the last without KV"
            raise RequestError("kv", msg)
        try:
            handoff.check(self._runner.layers, kv)
        except handoff.HandoffError as error:
            raise RequestError("kv", str(error)) from error

    def _start(self, request_id: RequestId, tokens: int, cached: tuple[PrefixKey, ...]) -> None:
        opened = self._opened.get(request_id)
        if opened is None or len(opened.tokens) != tokens:
            known = None if opened is None else len(opened.tokens)
            msg = f"request {request_id} starts with {tokens} tokens; {known} are known"
            raise PlanError(msg)
        if not self._lost.isdisjoint(cached):
            self._broken[request_id] = "a shared block it begins with was lost in a failed step"
            cached = ()
        self._rows.start(request_id, opened.tokens, cached)
        self._endings.start(self._rows.row(request_id), opened.work)

    def _plan_step(self, plan: StepPlan) -> Step | None:
        chunks, decode = plan.chunks, plan.decode
        if self._broken:
            decode = tuple(name for name in decode if name not in self._broken)
            chunks = tuple(chunk for chunk in chunks if chunk.id not in self._broken)
            for chunk in plan.chunks:
                if chunk.id in self._broken:
                    self._lost.update(key for _, key in chunk.publish)
        if not (chunks or decode):
            return None
        return self._steps.make(chunks, decode, undisturbed=not plan.drops)

    def _compute(
        self,
        step: Step,
        tokens: dict[RequestId, Token],
        stopped: dict[RequestId, tuple[PrefixKey, ...]],
        failed: dict[RequestId, str],
    ) -> None:
        """Run the model, then write down what it brought."""
        rows = self._rows
        computed = self._runner.run(self._steps, step)
        rows.computed[step.segments.rows] = step.inputs.context
        failed.update({step.ids[index]: why for index, why in computed.failed.items()})
        for chunk in step.chunks:
            if chunk.id in failed:
                self._lost.update(key for _, key in chunk.publish)
                continue
            for index, key in chunk.publish:
                rows.publish(rows.row(chunk.id), index, key)
        sampled, where = step.sampled, step.where
        if computed.failed:
            sampled = tuple(name for name in sampled if name not in failed)
            where = rows.of(sampled)
        if not sampled:
            return
        drawn = self._sample(computed.logits, sampled, where, tokens, stopped)
        if not computed.failed:
            self._steps.sampled(drawn)

    def _sample(
        self,
        logits: torch.Tensor,
        ids: tuple[RequestId, ...],
        rows: Ints,
        tokens: dict[RequestId, Token],
        stopped: dict[RequestId, tuple[PrefixKey, ...]],
    ) -> Ints:
        with torch.inference_mode():
            draw = self._sampler.draw(logits, ids)
        drawn: Ints = draw.ids.cpu().numpy()
        tokens.update(zip(ids, draw.tokens(), strict=True))
        self._rows.append(rows, drawn)
        ended = self._endings.ended(rows, drawn, self._rows.total[rows])
        for index in np.flatnonzero(ended).tolist():
            stopped[ids[index]] = self._keys(int(rows[index]))
        return drawn

    def _keys(self, row: int) -> tuple[PrefixKey, ...]:
        """Prefix keys of all full blocks of a row."""
        if not self.capabilities.prefix_cache:
            return ()
        known = self._rows.known(row)[: self._rows.computed[row]]
        return prefix_keys(known.tolist(), self.capabilities.block_size)
