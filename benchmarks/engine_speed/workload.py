"""The models and requests of the engine speed benchmark; standard library only.

Every side of the comparison imports this file with its own Python.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, int]] = {
    "30M": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 16_000,
    },
    "100M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32_000,
    },
}
CONTEXT = 512
PROMPT = (32, 256)
OUTPUT = (64, 128)
SEED = 7

Requests = list[tuple[list[int], int]]
"""Prompt token ids and the exact number of tokens to generate."""


def requests(model: str, count: int, trial: int) -> Requests:
    """``count`` requests, the same for every side, different for every trial."""
    rng = random.Random(f"{SEED}/{model}/{count}/{trial}")
    vocabulary = MODELS[model]["vocab_size"]
    return [
        (
            [rng.randrange(10, vocabulary) for _ in range(rng.randint(*PROMPT))],
            rng.randint(*OUTPUT),
        )
        for _ in range(count)
    ]


def serve(
    load: Callable[[Path, str, int], tuple[Callable[[Requests], int], dict[str, str]]],
) -> None:
    """A side's main loop: load a model once, then time one batch of requests per input line.

    ``load(folder, dtype, threads)`` returns a function that runs requests and returns how
    many tokens came out, and the versions to report.
    """
    import time

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the replies

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    folder, dtype, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    run, versions = load(folder, dtype, threads)
    reply({"versions": versions})
    for line in sys.stdin:
        batch: Requests = [(prompt, output) for prompt, output in json.loads(line)]
        start = time.perf_counter()
        tokens = run(batch)
        seconds = time.perf_counter() - start
        wanted = sum(output for _, output in batch)
        if tokens != wanted:
            raise SystemExit(f"{tokens} tokens came out; {wanted} were asked for")
        reply({"seconds": seconds, "tokens": tokens})
