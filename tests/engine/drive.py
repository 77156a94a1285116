"""Drives the native engine with the real scheduler, and asks transformers for the truth."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from penstock.core.engine import Ticket, Work
from penstock.core.memory import prefix_keys
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.sampling import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Ended, Request, RequestId, StepPlan, Token
from penstock.engine import LoadedModel, NativeEngine
from penstock.engine.loading import random_module

GREEDY = SamplingParams(temperature=0.0)

# Small enough that four requests of 20 tokens and more cannot all stay.
TIGHT = Capabilities(
    kv_blocks=14,
    block_size=4,
    max_batch=4,
    max_step_tokens=12,
    max_request_tokens=40,
    prefix_cache=True,
)


@dataclass(frozen=True)
class Job:
    """A request to be."""

    prompt: Sequence[int]
    cap: int = 10
    sampling: SamplingParams = GREEDY
    trace_length: int | None = None


@dataclass
class Outcome:
    """What came of a run."""

    texts: dict[RequestId, list[int]] = field(default_factory=dict)
    tokens: dict[RequestId, list[Token]] = field(default_factory=dict)
    ended: dict[RequestId, Ended] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    @property
    def evictions(self) -> int:
        """Times that a request lost its memory."""
        return sum(end.evictions for end in self.ended.values())

    @property
    def hits(self) -> int:
        """Blocks that requests found in the prefix cache."""
        return sum(len(start.cached) for plan in self.plans for start in plan.starts)

    @property
    def mixed(self) -> int:
        """Steps that prefill some requests in part and decode others."""
        return sum(
            bool(plan.decode) and any(not chunk.samples for chunk in plan.chunks)
            for plan in self.plans
        )


class Recorder(NativeEngine):
    """A native engine that keeps every plan and checks its books after it."""

    def __init__(self, model: LoadedModel, capabilities: Capabilities) -> None:
        super().__init__(model, capabilities)
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> Ticket:
        self.plans.append(plan)
        ticket = super().submit(plan)
        self.check()
        return ticket


def serve(engine: Recorder, jobs: Sequence[Job], preset: str = "vllm") -> Outcome:
    """Run jobs to the end; request ids are their indices."""
    capabilities = engine.capabilities
    scheduler = Scheduler(capabilities, presets.build(preset, seed=1))
    runtime = Runtime(scheduler, engine, time.monotonic)
    for index, job in enumerate(jobs):
        keys = ()
        if capabilities.prefix_cache:
            keys = prefix_keys(job.prompt, capabilities.block_size)
        request = Request(str(index), len(job.prompt), job.cap, 0.0, prefix=keys)
        runtime.add(request, Work(job.prompt, job.sampling, job.trace_length))
    outcome = Outcome(plans=engine.plans)
    while (output := runtime.step()) is not None:
        for request_id, token in output.tokens.items():
            outcome.texts.setdefault(request_id, []).append(token.id)
            outcome.tokens.setdefault(request_id, []).append(token)
        outcome.ended.update((end.id, end) for end in output.ended)
    scheduler.check()
    return outcome


def prompts(seed: int = 0, vocab: int = 128) -> list[list[int]]:
    """Six prompts of which the last two begin alike, for three blocks of four."""
    rng = random.Random(seed)
    made = [[rng.randrange(vocab) for _ in range(size)] for size in (5, 11, 3, 17, 14, 17)]
    made[5][:12] = made[3][:12]
    return made


def generate(
    config: PreTrainedConfig, seed: int, asked: Sequence[Sequence[int]], tokens: int
) -> list[list[int]]:
    """Greedy continuations by transformers' own attention and generation loop."""
    module = random_module(config, seed, torch.float32, "eager")
    module.generation_config.eos_token_id = None
    texts = []
    for prompt in asked:
        ids = torch.tensor([list(prompt)])
        output = module.generate(
            ids,
            # Without it, transformers would take tokens that equal the padding for padding.
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        texts.append(output[0, len(prompt) :].tolist())
    return texts
