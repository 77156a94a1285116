"""vLLM's CPU build, in its own Python; compiled, as it comes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from workload import CONTEXT, Requests, serve


def load(
    folder: Path, dtype: str, threads: int
) -> tuple[Callable[[Requests], int], dict[str, str]]:
    """See :func:`workload.serve`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(threads)))
    import torch
    import vllm

    llm = vllm.LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(batch: Requests) -> int:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in batch]
        sampling = [
            vllm.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
            for _, output in batch
        ]
        results = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return run, {"vllm": vllm.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
