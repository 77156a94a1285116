"""vLLM's engine loop around a scheduler, with workers that have no model.

The worker keeps real block tables and a real (tiny) KV memory: what it writes for a token depends
on what it reads for the one before, through the request's block table.  Its next token is a
function of the last value.  So one block in the wrong place, overwritten, or shared with the wrong
request makes another text than :func:`text_of`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from penstock.vllm import Scheduler

DEMO = Path(__file__).resolve().parents[2] / "src/penstock/models/demo"
VOCABULARY = 4096
EOS = 2
BLOCK = 4


def _next_value(before: int, token: int) -> int:
    return crc32(f"{before},{token}".encode())


def _token(value: int, position: int) -> int:
    return 3 + crc32(f"{value}:{position}".encode()) % (VOCABULARY - 3)


def text_of(prompt: list[int], count: int, adapter: int = 0) -> list[int]:
    """The output that the made-up model gives to a prompt, with a LoRA adapter or without."""
    value, tokens = adapter, list(prompt)
    for token in prompt:
        value = _next_value(value, token)
    for _ in range(count):
        tokens.append(_token(value, len(tokens)))
        value = _next_value(value, tokens[-1])
    return tokens[len(prompt) :]


@dataclass
class _Known:
    """What a worker knows of a request."""

    prompt: list[int]
    tokens: list[int]
    blocks: list[int]
    computed: int
    adapter: int


@dataclass
class Worker:
    """The first model runner's side of the protocol."""

    blocks: int
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    known: dict[str, _Known] = field(default_factory=dict)
    before: set[str] = field(default_factory=set)
    steps: int = 0
    most_tokens: int = 0
    most_adapters: int = 0

    def run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Execute one step."""
        for request_id in output.finished_req_ids:
            self.known.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.known, f"{new.req_id} is new twice"
            (blocks,) = new.block_ids
            prompt = list(new.prompt_token_ids)
            adapter = 0 if new.lora_request is None else new.lora_request.lora_int_id
            self.known[new.req_id] = _Known(
                prompt, list(prompt), list(blocks), new.num_computed_tokens, adapter
            )
        self._update(output)
        self.before = set(output.num_scheduled_tokens)
        if not output.num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.steps += 1
        self.most_tokens = max(self.most_tokens, output.total_num_scheduled_tokens)
        ids = list(output.num_scheduled_tokens)
        adapters = {self.known[name].adapter for name in ids} - {0}
        self.most_adapters = max(self.most_adapters, len(adapters))
        sampled = [self._compute(name, output.num_scheduled_tokens[name]) for name in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=sampled,
        )

    def _update(self, output: SchedulerOutput) -> None:
        cached = output.scheduled_cached_reqs
        # Whole texts are sent for those who were not in the step before, and for nobody else but
        # those who begin again.
        absent = set(cached.req_ids) - self.before
        assert absent <= set(cached.all_token_ids) <= absent | cached.resumed_req_ids
        for index, name in enumerate(cached.req_ids):
            known, new = self.known[name], cached.new_block_ids[index]
            if name in cached.resumed_req_ids:
                known.blocks = list(new[0])
                known.tokens = list(cached.all_token_ids[name])
                assert len(known.tokens) - len(known.prompt) == cached.num_output_tokens[index]
            elif new is not None:
                known.blocks += new[0]
            known.computed = cached.num_computed_tokens[index]

    def _compute(self, name: str, count: int) -> list[int]:
        known = self.known[name]
        start, end = known.computed, known.computed + count
        assert count > 0
        assert end <= len(known.tokens), f"{name} is to compute tokens that it does not have"
        assert len(known.blocks) * BLOCK >= end, f"{name} has no blocks for its tokens"
        assert len(set(known.blocks)) == len(known.blocks)
        assert all(0 < block < self.blocks for block in known.blocks)
        value = self.memory[self._slot(known, start - 1)] if start else known.adapter
        for position in range(start, end):
            value = _next_value(value, known.tokens[position])
            self.memory[self._slot(known, position)] = value
        if end < len(known.tokens):
            return []
        known.tokens.append(_token(value, len(known.tokens)))
        return known.tokens[-1:]

    def _slot(self, known: _Known, position: int) -> tuple[int, int]:
        return known.blocks[position // BLOCK], position % BLOCK


class Loop:
    """What vLLM's engine core does, step by step; ``depth`` 2 is asynchronous scheduling."""

    def __init__(
        self,
        plugin: dict[str, Any] | None = None,
        *,
        blocks: int = 64,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_model_len: int = 128,
        asynchronous: bool = True,
        caching: bool = True,
        scheduler: type = Scheduler,
        **config: Any,
    ) -> None:
        self.depth = 2 if asynchronous else 1
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=caching)
        cache.num_gpu_blocks = blocks
        vllm_config = VllmConfig(
            model_config=ModelConfig(
                model=str(DEMO), dtype="float32", max_model_len=max_model_len, seed=0
            ),
            cache_config=cache,
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                enable_chunked_prefill=config.pop("chunked", True),
                is_encoder_decoder=False,
                async_scheduling=asynchronous,
                policy=config.pop("policy", "fcfs"),
            ),
            additional_config={"penstock": plugin or {}},
            **config,
        )
        # vLLM's CPU platform switches it off; these workers can.
        vllm_config.scheduler_config.async_scheduling = asynchronous
        assert vllm_config.max_concurrent_batches == self.depth
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self.scheduler: Any = scheduler(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups
            ),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256) if caching else None
        self.worker = Worker(blocks)
        self._queue: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.texts: dict[str, list[int]] = {}
        self.ends: dict[str, EngineCoreOutput] = {}

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        priority: int = 0,
        adapter: int = 0,
        **sampling: Any,
    ) -> Request:
        """A request comes."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, **sampling)
        params.update_from_generation_config({}, EOS)
        request = Request(
            name,
            list(prompt),
            params,
            None,
            priority=priority,
            lora_request=LoRARequest(f"a{adapter}", adapter, "nowhere") if adapter else None,
            block_hasher=self._hasher,
        )
        self.texts[name] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        """Its client leaves."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> bool:
        """One turn; False if there is nothing to do."""
        scheduler = self.scheduler
        if scheduler.has_requests():
            output = scheduler.schedule()
            self._queue.appendleft((output, self.worker.run(output)))
            if len(self._queue) < self.depth and (
                output.total_num_scheduled_tokens or scheduler.has_requests()
            ):
                return True
        elif not self._queue:
            return False
        self._take(scheduler.update_from_output(*self._queue.pop()))
        return True

    def _take(self, outputs: dict[int, Any]) -> None:
        for one in outputs.get(0).outputs if 0 in outputs else ():
            assert one.request_id not in self.ends, f"{one.request_id} goes on after its end"
            self.texts[one.request_id] += one.new_token_ids
            if one.finish_reason is not None:
                self.ends[one.request_id] = one

    def run(self, most: int = 5000) -> None:
        """Until there is nothing to do."""
        for _ in range(most):
            if not self.step():
                self.check_idle()
                return
        msg = f"not done after {most} steps: {self.scheduler.core.stats(0.0)}"
        raise AssertionError(msg)

    def check_idle(self) -> None:
        """Nothing is left of anybody."""
        scheduler = self.scheduler
        scheduler.core.check()
        scheduler.tables.check()
        assert not scheduler.requests
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.core.stats(0.0).kv_used == 0
