"""The native engine, turned by the scheduler and the runtime that also turn the server."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from workload import CONTEXT, Requests, serve

from penstock.core.engine import Work
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.sampling import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.types import Request
from penstock.engine import NativeEngine, kernels


def load(
    folder: Path, dtype: str, threads: int
) -> tuple[Callable[[Requests], int], dict[str, str]]:
    """See :func:`workload.serve`."""
    engine = NativeEngine.load(
        str(folder),
        dtype=dtype,
        kv_tokens=64 * CONTEXT,
        max_batch=64,
        max_step_tokens=512,
        prefix_cache=False,
        threads=threads,
    )
    gc.collect()  # as the server's engine process does
    gc.freeze()
    scheduler = Scheduler(engine.capabilities, presets.build("past-future"))
    runtime = Runtime(scheduler, engine, time.perf_counter)
    served = 0

    def run(batch: Requests) -> int:
        nonlocal served
        for prompt, output in batch:
            served += 1
            sampling = SamplingParams(temperature=0.0, ignore_eos=True)
            request = Request(str(served), len(prompt), output, time.perf_counter())
            runtime.add(request, Work(prompt, sampling))
        tokens = 0
        while (step := runtime.step()) is not None:
            tokens += len(step.tokens)
        return tokens

    return run, {
        "kernels": kernels.backend(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    serve(load)
