"""transformers' own continuous batching, with its defaults but for the token budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from workload import Requests, serve


def load(
    folder: Path, dtype: str, threads: int
) -> tuple[Callable[[Requests], int], dict[str, str]]:
    """See :func:`workload.serve`."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.set_attn_implementation("sdpa")

    def run(batch: Requests) -> int:
        # generate_batch has one output length for a whole call, so requests go in one by one.
        config = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128
        )
        batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512)
        total = 0
        with model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=batching,
            persistent_manager=True,  # its cache is made once, in the trial that is not counted
        ) as manager:
            for prompt, output in batch:
                manager.add_request(prompt, max_new_tokens=output)
            for _ in batch:
                result = manager.get_result(timeout=600)
                if result is None or result.error:
                    raise SystemExit(f"transformers gave up a request: {result}")
                total += len(result.generated_tokens)
        return total

    return run, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
