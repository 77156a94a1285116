"""What the sampler keeps per request: parameters, the place in its random stream, counts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.sampling import SamplingParams
from penstock.core.types import RequestId

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: scores divided by them leave float32's useful range."""

ROW = np.dtype(
    [
        ("key", np.uint64),
        ("drawn", np.uint64),
        ("temperature", np.float32),
        ("greedy", np.bool_),
        ("truncates", np.bool_),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("penalizes", np.bool_),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("biased", np.bool_),
        ("logprobs", np.int64),
    ]
)
"""One request's sampling parameters.  Off is ``logprobs`` -1, ``top_p`` 2, ``top_k`` vocab."""


def stream_key(seed: int | None, sampler_seed: int, request_id: RequestId) -> int:
    """The 64-bit key of a request's random stream, from its seed if it has one."""
    name = f"{sampler_seed}/{request_id}" if seed is None else f"{seed}"
    person = b"request" if seed is None else b"seed"
    digest = blake2b(name.encode(), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little")


def uniforms(
    keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1): element ``positions`` of the SplitMix64 streams that start at ``keys``.

    Counter-based, so that a number depends on nothing but (key, position).
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    z = keys + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    fraction: npt.NDArray[np.float64] = (z >> np.uint64(12)) * 2.0**-52
    return fraction


class ParameterTable:
    """The parameters of all open requests in one array, so that a batch is one gather."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab = vocab_size
        self._seed = seed
        self._slots: dict[RequestId, int] = {}
        self._free: list[int] = []
        self.rows = np.zeros(64, dtype=ROW)

    def open(self, request_id: RequestId, sampling: SamplingParams, drawn: int = 0) -> None:
        """Give the request a row, ``drawn`` places on in its random stream.

        Raises:
            ValueError: it has one.
        """
        if request_id in self._slots:
            msg = f"request {request_id} is open in this sampler; close it first"
            raise ValueError(msg)
        slot = self._free.pop() if self._free else len(self._slots)
        if slot == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self._slots[request_id] = slot
        self._write(self.rows[slot : slot + 1], request_id, sampling)
        self.rows["drawn"][slot] = drawn

    def close(self, request_id: RequestId) -> None:
        """Take the row back.

        Raises:
            KeyError: it has none.
        """
        self._free.append(self._slots.pop(request_id))

    def slots(self, request_ids: Sequence[RequestId]) -> npt.NDArray[np.int64]:
        """The rows of these requests."""
        return np.fromiter(map(self._slots.__getitem__, request_ids), np.int64, len(request_ids))

    def _write(
        self, row: npt.NDArray[np.void], request_id: RequestId, params: SamplingParams
    ) -> None:
        greedy = params.temperature < GREEDY_BELOW
        top_k = min(params.top_k, self._vocab) or self._vocab
        top_p = params.top_p if params.top_p < 1.0 else 2.0
        truncates = top_k < self._vocab or top_p < 1.0 or params.min_p > 0.0
        row["key"] = stream_key(params.seed, self._seed, request_id)
        row["temperature"] = 1.0 if greedy else params.temperature
        row["greedy"] = greedy
        row["truncates"] = truncates and not greedy
        row["top_k"], row["top_p"], row["min_p"] = top_k, top_p, params.min_p
        row["penalizes"] = needs_counts(params)
        row["repetition"] = params.repetition_penalty
        row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
        row["biased"] = bool(params.logit_bias)
        row["logprobs"] = -1 if params.logprobs is None else params.logprobs


def needs_counts(params: SamplingParams) -> bool:
    """Whether choosing the next token needs to know the earlier ones."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


class TokenCounts:
    """Which tokens are in the prompt, and how often each is in the output, per request.

    Rows are on the model's device and belong to a request from its first token until it is
    closed; a waiting request costs nothing here but its prompt.
    """

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._waiting: dict[RequestId, tuple[Sequence[int], Sequence[int]]] = {}
        self._slots: dict[RequestId, int] = {}
        self._free: list[int] = []
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self.in_output = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)

    def open(
        self, request_id: RequestId, prompt: Sequence[int], generated: Sequence[int] = ()
    ) -> None:
        """Remember a prompt, and output from elsewhere, until the request's first token here."""
        self._waiting[request_id] = (prompt, generated)

    def close(self, request_id: RequestId) -> None:
        """Forget the request, if it was known."""
        self._waiting.pop(request_id, None)
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def slot(self, request_id: RequestId) -> int:
        """The request's row, made on first use."""
        slot = self._slots.get(request_id)
        if slot is not None:
            return slot
        slot = self._free.pop() if self._free else len(self._slots)
        if slot == len(self.in_prompt):
            self._grow()
        self._slots[request_id] = slot
        waited = self._waiting.pop(request_id)
        prompt, generated = (
            torch.as_tensor(list(tokens), dtype=torch.int64, device=self.in_prompt.device)
            for tokens in waited
        )
        self.in_prompt[slot] = False
        self.in_prompt[slot, prompt] = True
        self.in_output[slot] = torch.bincount(generated, minlength=self.in_output.shape[1])
        return slot

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """Count one output token ``[n]`` for each of the different rows ``slots`` ``[n]``."""
        self.in_output[slots, tokens] += 1

    def _grow(self) -> None:
        more = max(4, len(self.in_prompt))
        shape = (more, self.in_prompt.shape[1])
        self.in_prompt = torch.cat([self.in_prompt, self.in_prompt.new_zeros(shape)])
        self.in_output = torch.cat([self.in_output, self.in_output.new_zeros(shape)])
