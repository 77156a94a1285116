"""Generation in a Python program or a notebook: the scheduler and the engine without a server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, cast

from penstock.core.engine import Engine, Work
from penstock.core.memory import prefix_keys
from penstock.core.policies import presets
from penstock.core.policies.base import Policy
from penstock.core.runtime import Runtime, StepOutput
from penstock.core.sampling import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.types import (
    SLO,
    Ended,
    FinishReason,
    OnMiss,
    Request,
    RequestError,
    RequestId,
    Token,
)
from penstock.llm_input import caps_of, chats_of, each, on_miss_of, prompts_of, stops_of
from penstock.models import model_path
from penstock.text import TextStream, load_tokenizer
from penstock.text.chat import Message

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of one prompt.

    Attributes:
        text: the output, without the token or stop string that ended it.
        token_ids: the output's tokens, the one that ended it included.
        finish_reason: how it ended; ``stop`` or ``length`` if all went well.
        prompt_tokens: length of the prompt.
        ttft: seconds from the call to the first token, queueing included; None without a token.
        e2e: seconds from the call to the end.
        evictions: how often its KV memory was given away and computed again.
        detail: in words, why it did not end well.
        logprobs: one entry per token, if the sampling parameters ask for log probabilities.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    ttft: float | None
    e2e: float
    evictions: int = 0
    detail: str = ""
    logprobs: tuple[Token, ...] | None = None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        if self.ttft is None or len(self.token_ids) < 2:
            return None
        return (self.e2e - self.ttft) / (len(self.token_ids) - 1)


@dataclass(slots=True)
class _Output:
    """A request on its way."""

    prompt: Sequence[int]
    sampling: SamplingParams
    text: TextStream
    silent: frozenset[int]
    began: float
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    first: float | None = None
    completion: Completion | None = None

    def push(self, token: Token, now: float) -> bool:
        """Take a token; True if a stop string ended the text."""
        if self.first is None:
            self.first = now
        self.tokens.append(token)
        if token.id not in self.silent:
            self.pieces.append(self.text.push(token.id))
        return self.text.stopped

    def finish(self, ended: Ended, now: float) -> None:
        self.pieces.append(self.text.finish())
        reason = FinishReason.STOP if self.text.stopped else ended.reason
        self.completion = Completion(
            text="".join(self.pieces),
            token_ids=tuple(token.id for token in self.tokens),
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            ttft=None if self.first is None else self.first - self.began,
            e2e=now - self.began,
            evictions=ended.evictions,
            detail=ended.detail,
            logprobs=None if self.sampling.logprobs is None else tuple(self.tokens),
        )


class LLM:
    """A model and its scheduler in this process.  Not thread-safe.

    Args:
        model: a model's folder in Hugging Face's layout, or ``demo`` for the small model
            that is included.
        preset: the scheduling preset's name, or a policy made by
            :func:`penstock.core.policies.presets.build`.
        engine: run the requests here instead of loading the model's weights; it is closed
            with this object.
        engine_options: passed to :meth:`penstock.engine.NativeEngine.load`.

    Raises:
        ImportError: PyTorch is not installed (``pip install penstock[engine]``).
        FileNotFoundError: the model is not there.
        ValueError: an unknown preset, or a model that cannot be run.

    Attributes:
        tokenizer: the model's.
        runtime: what turns the steps; ``runtime.scheduler`` keeps the books.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        preset: str | Policy = "past-future",
        engine: Engine | None = None,
        **engine_options: Any,
    ) -> None:
        policy = _policy(preset)
        folder = model_path(model)
        self.tokenizer = load_tokenizer(folder)
        if engine is None:
            engine = _native_engine(folder, engine_options)
        elif engine_options:
            msg = f"{next(iter(engine_options))} is an option of the native engine; engine is given"
            raise ValueError(msg)
        self.runtime = Runtime(Scheduler(engine.capabilities, policy), engine, time.perf_counter)
        self._outputs: dict[RequestId, _Output] = {}
        self._added = 0
        self._closed = ""

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_tokens: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        slo: SLO | Sequence[SLO] | None = None,
        on_miss: OnMiss | str = OnMiss.KEEP,
    ) -> list[Completion]:
        """Complete prompts, all of them at once, and return the outputs in their order.

        Args:
            prompts: one text, texts, or token ids of each prompt.
            sampling: how tokens are chosen; one for all prompts, or one for each.
            max_tokens: most output tokens; one number for all prompts, or one for each.  By
                default 256, or what the model's context leaves.
            stop: texts that end an output, which stops before them.
            slo: latency promise; one for all prompts, or one for each.
            on_miss: what to do with a request that can no longer keep its promise.

        Raises:
            RequestError: a prompt or parameter cannot be served; names the field.  Nothing
                of this call is left behind.
            ValueError: this object is closed.
        """
        stops = stops_of(stop)
        encoded = prompts_of(prompts, self.tokenizer)
        streams = [TextStream(self.tokenizer, stop=stops, prompt=prompt) for prompt in encoded]
        return self._run(encoded, streams, sampling, max_tokens, slo, on_miss)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_tokens: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        slo: SLO | Sequence[SLO] | None = None,
        on_miss: OnMiss | str = OnMiss.KEEP,
    ) -> list[Completion]:
        """Answer one chat, or several at once; otherwise as :meth:`generate`.

        Args:
            messages: one chat, or several: dictionaries with ``role`` and ``content``.
            sampling: how tokens are chosen.
            max_tokens: most output tokens.
            stop: texts that end an output.
            slo: latency promise.
            on_miss: what to do with a request that can no longer keep its promise.

        Raises:
            RequestError: as for :meth:`generate`, and if the model has no chat template.
            ValueError: as for :meth:`generate`.
        """
        stops = stops_of(stop)
        encoded = [self.tokenizer.apply_chat_template(chat) for chat in chats_of(messages)]
        streams = [TextStream(self.tokenizer, stop=stops) for _ in encoded]
        return self._run(encoded, streams, sampling, max_tokens, slo, on_miss)

    def close(self) -> None:
        """Give the engine's memory back.  Idempotent."""
        self._close("this LLM is closed")

    def _close(self, why: str) -> None:
        if not self._closed:
            self._closed = why
            self.runtime.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[TextStream],
        sampling: object,
        max_tokens: object,
        slo: object,
        on_miss: object,
    ) -> list[Completion]:
        if self._closed:
            raise ValueError(self._closed)
        count = len(prompts)
        given = SamplingParams() if sampling is None else sampling
        samplings = each("sampling", given, SamplingParams, count)
        slos = each("slo", SLO() if slo is None else slo, SLO, count)
        miss = on_miss_of(on_miss)
        caps = (
            [self._default_cap(prompt) for prompt in prompts]
            if max_tokens is None
            else caps_of(max_tokens, count)
        )
        outputs: list[_Output] = []
        with _deferred_interrupt() as interrupts:
            try:
                for prompt, text, one, cap, promise in zip(
                    prompts, streams, samplings, caps, slos, strict=True
                ):
                    silent = frozenset((*self.tokenizer.eos_ids, *one.stop_token_ids))
                    output = _Output(prompt, one, text, silent, time.perf_counter())
                    self._add(output, cap, promise, miss)
                    outputs.append(output)
            except ValueError:
                self._cancel_all()
                raise
            finally:
                self._turn_or_close(interrupts)
        return [cast("Completion", output.completion) for output in outputs]

    def _default_cap(self, prompt: Sequence[int]) -> int:
        capabilities = self.runtime.engine.capabilities
        limit = min(capabilities.max_request_tokens, capabilities.kv_tokens)
        if len(prompt) >= limit:
            msg = f"a prompt has {len(prompt)} tokens; context and KV memory take below {limit}"
            raise RequestError("prompts", msg)
        return min(DEFAULT_MAX_TOKENS, limit - len(prompt))

    def _add(self, output: _Output, cap: int, slo: SLO, on_miss: OnMiss) -> None:
        capabilities = self.runtime.engine.capabilities
        keys = (
            prefix_keys(output.prompt, capabilities.block_size) if capabilities.prefix_cache else ()
        )
        request_id = str(self._added)
        self._added += 1
        request = Request(
            request_id,
            len(output.prompt),
            cap,
            output.began,
            slo=slo,
            on_miss=on_miss,
            prefix=keys,
        )
        self.runtime.add(request, Work(output.prompt, output.sampling))
        self._outputs[request_id] = output

    def _turn_or_close(self, interrupts: Sequence[int]) -> None:
        """Turn until idle; after a step that broke off, scheduler and engine disagree for good."""
        try:
            self._turn_until_idle(interrupts)
        except BaseException as error:
            self._outputs.clear()
            self._close(f"this LLM is closed, since a step broke off: {error!r}")
            raise

    def _turn_until_idle(self, interrupts: Sequence[int]) -> None:
        while (step := self.runtime.step()) is not None:
            self._deliver(step, time.perf_counter())
            if interrupts:
                self._cancel_all()
        left = len(self._outputs)
        self._outputs.clear()
        if left:
            msg = f"the scheduler has no plan for {left} requests that have not ended"
            raise RuntimeError(msg)

    def _cancel_all(self) -> None:
        for request_id in self._outputs:
            self.runtime.cancel(request_id)

    def _deliver(self, step: StepOutput, now: float) -> None:
        for request_id, token in step.tokens.items():
            output = self._outputs.get(request_id)
            if output is not None and not output.text.stopped and output.push(token, now):
                self.runtime.cancel(request_id, FinishReason.STOP)
        for ended in step.ended:
            output = self._outputs.pop(ended.id, None)
            if output is not None:
                output.finish(ended, now)


@contextmanager
def _deferred_interrupt() -> Iterator[Sequence[int]]:
    """Hold Ctrl-C back until a step is complete, and raise KeyboardInterrupt at the end.

    An exception in the middle of a step would leave scheduler and engine with different books,
    and a notebook's next cell with a model that cannot be used.  A second Ctrl-C is not held.
    """
    default = signal.default_int_handler
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            default(number, frame)
        caught.append(number)

    # Signals can only be handled in the main thread, and a program's own handler has precedence.
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not default:
        yield caught
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, default)
    if caught:
        raise KeyboardInterrupt


def _native_engine(folder: Path, options: Mapping[str, Any]) -> Engine:
    try:
        from penstock.engine import NativeEngine
    except ModuleNotFoundError as error:
        msg = f"running a model needs the engine extra, pip install 'penstock[engine]': {error}"
        raise ImportError(msg) from error
    return NativeEngine.load(str(folder), **options)


def _policy(preset: object) -> Policy:
    if isinstance(preset, Policy):
        return preset
    if not isinstance(preset, str):
        msg = f"preset is {preset!r}; it must be a preset's name, or a Policy made of one"
        raise ValueError(msg)  # noqa: TRY004 - as for a name that is unknown
    return presets.build(preset)
