"""Numbers of decoder layers of well-known models, which tables of layer times do not say."""

from __future__ import annotations

import re

# From the models' published config.json.
_LAYERS = {
    "llama-2-7b": 32, "llama-2-13b": 40, "llama-2-70b": 80,
    "llama-3-8b": 32, "llama-3-70b": 80, "llama-3.1-8b": 32, "llama-3.1-70b": 80,
    "llama-3.1-405b": 126, "llama-3.2-1b": 16, "llama-3.2-3b": 28, "llama-3.3-70b": 80,
    "mistral-7b": 32, "mixtral-8x7b": 32, "mixtral-8x22b": 56,
    "mistral-small-24b": 40, "mistral-nemo": 40,
    "qwen2-7b": 28, "qwen2.5-0.5b": 24, "qwen2.5-1.5b": 28, "qwen2.5-3b": 36,
    "qwen2.5-7b": 28, "qwen2.5-14b": 48, "qwen2.5-32b": 64, "qwen2.5-72b": 80,
    "qwen3-0.6b": 28, "qwen3-1.7b": 28, "qwen3-4b": 36, "qwen3-8b": 36, "qwen3-14b": 40,
    "qwen3-32b": 64, "qwen3-30b-a3b": 48, "qwen3-235b-a22b": 94,
    "gemma-2-9b": 42, "gemma-2-27b": 46, "gemma-3-4b": 34, "gemma-3-12b": 48, "gemma-3-27b": 62,
    "phi-3-mini-4k": 32, "phi-3-medium-4k": 40, "phi-4": 40,
    "opt-6.7b": 32, "opt-13b": 40, "opt-30b": 48, "opt-66b": 64,
    "gpt-oss-20b": 24, "gpt-oss-120b": 36, "deepseek-r1-distill-llama-8b": 32,
    "deepseek-r1-distill-llama-70b": 80, "deepseek-r1-distill-qwen-7b": 28,
    "deepseek-r1-distill-qwen-32b": 64,
}  # fmt: skip


def layers_of(text: str) -> int | None:
    """Decoder layers of the model that a name or a path speaks of; None if it is not known here."""
    plain = _plain(text)
    found = max((name for name in _LAYERS if _plain(name) in plain), key=len, default=None)
    return None if found is None else _LAYERS[found]


def depths() -> list[int]:
    """The depths that models have."""
    return sorted(set(_LAYERS.values()))


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
