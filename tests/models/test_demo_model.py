"""The embedded model is complete, small, licensed, loads offline and ends its answers itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from penstock.models import demo_path

MIB = 1024 * 1024
SOURCES = ("jargon", "dict-devil", "sword-text-web", "miscfiles", "wordnet-base")
FILES = {
    "LICENSES",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ENGINE_MISSING = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
needs_engine = pytest.mark.skipif(
    bool(ENGINE_MISSING), reason=f"not installed: {', '.join(ENGINE_MISSING)}"
)
TOKENIZER = Tokenizer.from_file(str(demo_path() / "tokenizer.json"))


def _json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((demo_path() / name).read_text("utf-8"))
    return content


def test_the_folder_holds_a_whole_checkpoint_of_at_most_15_mb() -> None:
    assert isinstance(demo_path(), Path)
    files = {path.name: path.stat().st_size for path in demo_path().iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 15 * MIB


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_text_is_named_beside_the_weights(source: str) -> None:
    for name in ("LICENSES", "README.md"):
        assert source in (demo_path() / name).read_text("utf-8")


def test_the_wordnet_notice_is_reproduced() -> None:
    text = (demo_path() / "LICENSES").read_text("utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in text
    assert 'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS"' in text


def test_the_config_is_a_small_llama_with_grouped_queries_and_room_for_long_requests() -> None:
    config = _json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == 4096
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()


def test_the_special_tokens_agree_in_every_file() -> None:
    config, generation, settings_ = map(
        _json, ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    for name in ("bos", "eos", "pad"):
        token_id = TOKENIZER.token_to_id(settings_[f"{name}_token"])
        assert token_id is not None
        assert config[f"{name}_token_id"] == generation[f"{name}_token_id"] == token_id
    assert all(TOKENIZER.token_to_id(token) is not None for token in SPECIAL)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    if any(token in text for token in SPECIAL):
        return
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["🙂👩‍👩‍👧‍👦🇺🇳", "你好世界", "Здравствуйте", "naïve “façade”", "\x00\t\r\n  a", ""]
)
def test_multi_byte_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids) == text


def test_english_takes_fewer_tokens_than_half_its_letters() -> None:
    text = "In the beginning, God created the heavens and the earth."
    assert len(TOKENIZER.encode(text).ids) < len(text) / 2


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Return the tokenizer and the model as transformers loads them with the network denied."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        demo_path(), local_files_only=True, dtype=torch.float32
    )
    return tokenizer, model


@needs_engine
def test_transformers_loads_every_weight(loaded: tuple[Any, Any]) -> None:
    _, model = loaded
    parameters = sum(p.numel() for p in model.parameters())
    assert 3_000_000 <= parameters <= 8_000_000
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_engine
def test_the_chat_template_renders_roles_and_turns(loaded: tuple[Any, Any]) -> None:
    tokenizer, _ = loaded
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Define 'hack'."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|eos|>"
        "<|user|>Define 'hack'.<|end|><|assistant|>"
    )
    assert tokenizer.encode(text, add_special_tokens=False).count(tokenizer.bos_token_id) == 1


@needs_engine
def test_answers_end_by_themselves(loaded: tuple[Any, Any]) -> None:
    import torch

    tokenizer, model = loaded
    words = ("house", "river", "beautiful", "king", "law")
    prompts = [*(f"Define '{word}'." for word in words), "Hello!", "Who are you?"]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=200, do_sample=True, top_k=0, top_p=1.0)
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = [
        row.index(tokenizer.eos_token_id) for row in answers if tokenizer.eos_token_id in row
    ]
    assert len(lengths) >= len(prompts) - 1
    assert len(set(lengths)) > len(lengths) // 2
