"""Greedy output equals transformers' own, token for token, for every supported model type.

Prompts are cut into chunks, requests are evicted and recomputed, and prefixes are shared,
because memory and steps are too small for anything else.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.core.sampling import SamplingParams
from penstock.engine import load_model, load_random
from penstock.engine.support import TESTED_TYPES
from penstock.models import demo_path
from tests.engine.drive import TIGHT, Job, Recorder, generate, prompts, serve
from tests.engine.tiny import MODELS, WINDOWED, tiny_config

TOKENS = 10

# Of a log probability.  Eight bits of mantissa over six layers; a wrong position, block or
# mask is off by whole units.
BFLOAT16_MEAN_ERROR = 0.03
BFLOAT16_WORST_ERROR = 0.15


def served(model_type: str, **changes: object) -> list[list[int]]:
    engine = Recorder(load_random(tiny_config(model_type, **changes), seed=1), TIGHT)
    outcome = serve(engine, [Job(prompt, TOKENS) for prompt in prompts()])
    assert outcome.evictions > 0, "the test shows nothing about recomputing"
    assert outcome.hits > 0, "the test shows nothing about shared prefixes"
    assert outcome.mixed > 0, "the test shows nothing about mixed steps"
    return [outcome.texts[str(index)] for index in range(len(prompts()))]


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_equals_transformers(model_type: str) -> None:
    texts = served(model_type)
    assert texts == generate(tiny_config(model_type), 1, prompts(), TOKENS)
    assert len({token for text in texts for token in text}) > 6, "the model says too little"


def test_tested_types_are_the_ones_that_are_claimed(root: Path) -> None:
    assert set(MODELS) == TESTED_TYPES
    page = (root / "docs" / "engine.md").read_text(encoding="utf-8")
    listed = page.split("<!-- tested -->")[1].split("<!-- /tested -->")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == TESTED_TYPES


@pytest.mark.parametrize("model_type", WINDOWED)
def test_window_matters_here(model_type: str) -> None:
    """Guards the test above: without the window, it would see other tokens."""
    wide = generate(tiny_config(model_type, sliding_window=200), 1, prompts(), TOKENS)
    assert wide != generate(tiny_config(model_type), 1, prompts(), TOKENS)


def test_softcap_matters_here() -> None:
    """Guards the first test in the same way."""
    loose = generate(tiny_config("gemma2", attn_logit_softcapping=50.0), 1, prompts(), TOKENS)
    assert loose != generate(tiny_config("gemma2"), 1, prompts(), TOKENS)


def test_bfloat16_stays_close_to_float32() -> None:
    """The demo model's own weights, through the layouts and kernels that bfloat16 gets."""
    engine = Recorder(load_model("demo", dtype="bfloat16", device="cpu"), TIGHT)
    asked = prompts(vocab=engine.vocab_size)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0)
    outcome = serve(engine, [Job(prompt, TOKENS, sampling) for prompt in asked])
    assert outcome.evictions > 0
    exact = AutoModelForCausalLM.from_pretrained(
        demo_path(), dtype=torch.float32, attn_implementation="eager"
    )
    errors = []
    for index, prompt in enumerate(asked):
        tokens = outcome.tokens[str(index)]
        text = torch.tensor([[*prompt, *(token.id for token in tokens)]])
        with torch.inference_mode():
            expected = exact(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for row, token in zip(expected, tokens, strict=True):
            assert token.logprob is not None
            errors.append(abs(token.logprob - row[token.id].item()))
    assert sum(errors) / len(errors) < BFLOAT16_MEAN_ERROR
    assert max(errors) < BFLOAT16_WORST_ERROR
