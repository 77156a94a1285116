"""How a request's tokens are chosen: data only, so that every runtime can carry it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request, with the OpenAI API's meaning and ranges.

    Attributes:
        temperature: 0 is greedy.
        top_p, top_k, min_p: truncation; ``top_k`` 0 and ``min_p`` 0 are off.
        repetition_penalty: as in Hugging Face (over prompt and output), 1 is off.
        presence_penalty, frequency_penalty: as in OpenAI (over the output), 0 is off.
        logit_bias: token id to an additive bias.
        seed: makes a request's tokens independent of what else is in the batch.
        logprobs: None: no log probabilities; k >= 0: the token's own and the top k.
        stop_token_ids: end with FinishReason.STOP after one of these.
        ignore_eos: do not end at the model's own end-of-sequence tokens.

    Raises:
        ValueError: naming the parameter, its value and the allowed range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 2.0)
        _check("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check("top_k", self.top_k, 0, 1 << 31)
        _check("min_p", self.min_p, 0.0, 1.0)
        # Logits are divided by it: near 0 they would become infinite.
        _check("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, 20)


def _check(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    above = value > low if low_open else value >= low
    if not (above and value <= high):
        bound = "(" if low_open else "["
        msg = f"{name} is {value!r}; it must be in {bound}{low:g}, {high:g}]"
        raise ValueError(msg)
