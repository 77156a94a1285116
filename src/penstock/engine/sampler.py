"""Batched sampling on the model's device: logits in, tokens out.

Order of operations, per request: repetition penalty, presence and frequency penalties,
logit bias, temperature, top-k, top-p, min-p, draw.  Log probabilities are of the model's
*raw* logits, before any of these, as in vLLM's default and the OpenAI API.

A request draws from a random stream of its own, keyed by its seed and counted by its output
tokens.  With the same logits it gets the same tokens, whatever else is in the batch, however
its prompt was chunked and however often it was evicted and recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.sampling import SamplingParams
from penstock.core.types import RequestError, RequestId, Token
from penstock.engine import sampling_ops as ops
from penstock.engine.sampling_ops import Rows
from penstock.engine.sampling_state import ParameterTable, TokenCounts, needs_counts, uniforms


@dataclass(frozen=True, slots=True)
class _Truncation:
    rows: Rows
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    head: int


@dataclass(frozen=True, slots=True)
class _Penalties:
    rows: Rows
    slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class _Bias:
    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class _LogprobRows:
    rows: Rows
    asked: tuple[tuple[int, int], ...]  # (row in the batch, how many alternatives)
    most: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Everything about a batch that stays the same while its requests do."""

    ids: Sequence[RequestId]
    slots: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    greedy: Tensor | None  # rows to take the argmax of; None: no row
    all_greedy: bool
    temperature: Tensor | None
    truncation: _Truncation | None
    penalties: _Penalties | None
    bias: _Bias | None
    logprobs: _LogprobRows | None


@dataclass(frozen=True, slots=True)
class _Logprobs:
    asked: tuple[tuple[int, int], ...]
    chosen: Tensor
    top_values: Tensor
    top_ids: Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """The tokens of one step, still on the device.

    Attributes:
        ids: int64 ``[n]``; the next step may read it there without a host copy.
    """

    ids: Tensor
    _logprobs: _Logprobs | None = None

    def tokens(self) -> list[Token]:
        """The tokens on the host.  Waits for the device."""
        ids: list[int] = self.ids.tolist()
        tokens = [Token(token) for token in ids]
        if self._logprobs is not None:
            chosen = self._logprobs.chosen.tolist()
            values, alternatives = (
                self._logprobs.top_values.tolist(),
                self._logprobs.top_ids.tolist(),
            )
            for i, (row, count) in enumerate(self._logprobs.asked):
                top = tuple(zip(alternatives[i][:count], values[i][:count], strict=True))
                tokens[row] = Token(ids[row], chosen[i], top)
        return tokens


class Sampler:
    """Chooses the next token of every request in a batch.

    Args:
        device: where logits come from and where all state is kept.
        vocab_size: width of the logits.
        seed: for requests without a seed of their own; with the same seed, the same
            request ids and the same logits give the same tokens.
    """

    def __init__(self, device: torch.device, vocab_size: int, seed: int = 0) -> None:
        self._device = device
        self._vocab = vocab_size
        self._table = ParameterTable(vocab_size, seed)
        self._counts = TokenCounts(device, vocab_size)
        self._biases: dict[RequestId, Mapping[int, float]] = {}
        self._batch: _Batch | None = None

    def open(
        self,
        request_id: RequestId,
        prompt: Sequence[int],
        sampling: SamplingParams,
        generated: Sequence[int] = (),
    ) -> None:
        """Take a request in.  Until it is closed its place in the random stream is kept.

        Args:
            generated: output tokens that it has already: its random stream goes on behind them.

        Raises:
            RequestError: a biased token, or a prompt token that a penalty has to look
                at, is not in the vocabulary.
            ValueError: a request of this id is open.
        """
        self._check_tokens("logit_bias", request_id, sampling.logit_bias)
        if needs_counts(sampling):
            self._check_tokens("prompt", request_id, prompt)
        self._table.open(request_id, sampling, len(generated))
        if needs_counts(sampling):
            self._counts.open(request_id, prompt, generated)
        if sampling.logit_bias:
            self._biases[request_id] = sampling.logit_bias

    def close(self, request_id: RequestId) -> None:
        """Forget a request.

        Raises:
            KeyError: it is not open.
        """
        self._table.close(request_id)
        self._counts.close(request_id)
        self._biases.pop(request_id, None)
        self._batch = None

    def sample(self, logits: Tensor, request_ids: Sequence[RequestId]) -> list[Token]:
        """One token per row; see :meth:`draw`."""
        return self.draw(logits, request_ids).tokens()

    def draw(self, logits: Tensor, request_ids: Sequence[RequestId]) -> Draw:
        """Choose one token per row, without waiting for the device.

        Args:
            logits: float32 ``[n, vocab]`` without NaN; left as they are.
            request_ids: the request of each row, each open and at most once.  For the very
                same tuple object as in the previous call, nothing is built anew.

        Raises:
            KeyError: a request is not open.
            ValueError: the shape of ``logits`` is wrong.
        """
        if logits.shape != (len(request_ids), self._vocab):
            msg = (
                f"logits have shape {tuple(logits.shape)}; "
                f"it must be {(len(request_ids), self._vocab)}"
            )
            raise ValueError(msg)
        batch = self._batch
        if batch is None or batch.ids is not request_ids:
            batch = self._build(request_ids)
            # Only a tuple: the same list object may hold other requests next time.
            self._batch = batch if isinstance(request_ids, tuple) else None
        ids = self._choose(self._adjust(logits, batch), batch)
        if batch.penalties is not None:
            self._counts.add(batch.penalties.slots, ids[batch.penalties.rows])
        return Draw(ids, _logprobs(logits, ids, batch.logprobs))

    def _adjust(self, scores: Tensor, batch: _Batch) -> Tensor:
        if (penalties := batch.penalties) is not None:
            part = ops.penalize(
                scores[penalties.rows],
                self._counts.in_prompt[penalties.slots],
                self._counts.in_output[penalties.slots],
                repetition=penalties.repetition,
                presence=penalties.presence,
                frequency=penalties.frequency,
            )
            scores = ops.replace_rows(scores, penalties.rows, part)
        if (bias := batch.bias) is not None:
            scores = scores.index_put((bias.rows, bias.tokens), bias.values, accumulate=True)
        return scores

    def _choose(self, scores: Tensor, batch: _Batch) -> Tensor:
        if batch.all_greedy:
            return ops.argmax(scores)
        drawn = self._table.rows["drawn"][batch.slots]
        self._table.rows["drawn"][batch.slots] = drawn + np.uint64(1)
        uniform = torch.from_numpy(uniforms(batch.keys, drawn)).to(self._device, non_blocking=True)
        heated = scores if batch.temperature is None else scores / batch.temperature
        probs = heated.softmax(dim=-1)
        if (cut := batch.truncation) is not None:
            part = ops.truncate(
                probs[cut.rows], top_k=cut.top_k, top_p=cut.top_p, min_p=cut.min_p, head=cut.head
            )
            probs = ops.replace_rows(probs, cut.rows, part)
        ids = ops.pick(probs, uniform)
        if batch.greedy is not None:
            ids = torch.where(batch.greedy, ops.argmax(scores), ids)
        return ids

    def _build(self, request_ids: Sequence[RequestId]) -> _Batch:
        slots = self._table.slots(request_ids)
        rows = self._table.rows[slots]
        greedy = rows["greedy"]
        heated = bool((rows["temperature"] != 1.0).any())
        return _Batch(
            ids=request_ids,
            slots=slots,
            keys=rows["key"].copy(),
            greedy=self._tensor(greedy) if greedy.any() else None,
            all_greedy=bool(greedy.all()),
            temperature=self._column(rows["temperature"]) if heated else None,
            truncation=self._truncation(rows),
            penalties=self._penalties(rows, request_ids),
            bias=self._bias(rows, request_ids),
            logprobs=self._logprob_rows(rows),
        )

    def _truncation(self, rows: npt.NDArray[np.void]) -> _Truncation | None:
        where = rows["truncates"]
        if not where.any():
            return None
        cut = rows[where]
        nucleus = cut["top_p"] < 1.0
        limits = cut["top_k"][nucleus | (cut["top_k"] < self._vocab)]
        return _Truncation(
            rows=self._where(where),
            top_k=self._column(cut["top_k"]),
            top_p=self._column(cut["top_p"]),
            min_p=self._column(cut["min_p"]),
            head=int(limits.max(initial=0)),
        )

    def _penalties(
        self, rows: npt.NDArray[np.void], request_ids: Sequence[RequestId]
    ) -> _Penalties | None:
        where = rows["penalizes"]
        if not where.any():
            return None
        used = rows[where]
        slots = [self._counts.slot(request_ids[i]) for i in where.nonzero()[0].tolist()]
        return _Penalties(
            rows=self._where(where),
            slots=torch.tensor(slots, device=self._device),
            repetition=self._column(used["repetition"]),
            presence=self._column(used["presence"]),
            frequency=self._column(used["frequency"]),
        )

    def _bias(self, rows: npt.NDArray[np.void], request_ids: Sequence[RequestId]) -> _Bias | None:
        entries = [
            (row, token, value)
            for row in rows["biased"].nonzero()[0].tolist()
            for token, value in self._biases[request_ids[row]].items()
        ]
        if not entries:
            return None
        where, tokens, values = zip(*entries, strict=True)
        return _Bias(
            rows=torch.tensor(where, device=self._device),
            tokens=torch.tensor(tokens, device=self._device),
            values=torch.tensor(values, dtype=torch.float32, device=self._device),
        )

    def _logprob_rows(self, rows: npt.NDArray[np.void]) -> _LogprobRows | None:
        where = rows["logprobs"] >= 0
        if not where.any():
            return None
        counts = np.minimum(rows["logprobs"][where], self._vocab)
        asked = tuple(zip(where.nonzero()[0].tolist(), counts.tolist(), strict=True))
        return _LogprobRows(self._where(where), asked, int(counts.max()))

    def _where(self, mask: npt.NDArray[np.bool_]) -> Rows:
        return slice(None) if mask.all() else self._tensor(mask.nonzero()[0])

    def _column(self, values: npt.NDArray[np.generic]) -> Tensor:
        return self._tensor(values)[:, None]

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _check_tokens(
        self, field: str, request_id: RequestId, tokens: Sequence[int] | Mapping[int, float]
    ) -> None:
        for token in tokens:
            if not 0 <= token < self._vocab:
                msg = (
                    f"request {request_id}: {field} names token {token}; "
                    f"token ids of this model are 0 to {self._vocab - 1}"
                )
                raise RequestError(field, msg)


def _logprobs(logits: Tensor, ids: Tensor, wanted: _LogprobRows | None) -> _Logprobs | None:
    if wanted is None:
        return None
    logprobs = logits[wanted.rows].log_softmax(dim=-1)
    chosen = logprobs.gather(-1, ids[wanted.rows][:, None])[:, 0]
    top = logprobs.topk(wanted.most, dim=-1)
    return _Logprobs(wanted.asked, chosen, top.values, top.indices)
