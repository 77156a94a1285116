"""Runs the model on a step, and finds the culprit where that fails."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.engine.attention import PagedLayer, Stage, attach, attached, detach
from penstock.engine.errors import UnsupportedModelError
from penstock.engine.kernels import PagedBatch
from penstock.engine.loading import LoadedModel
from penstock.engine.probe import AttentionSite
from penstock.engine.steps import Inputs, Mask, Step, Steps

_log = logging.getLogger(__name__)

_FAULTS = (RuntimeError, ValueError, IndexError, MemoryError)
_NOT_A_NUMBER = "the model's output for it is not a number"


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of a forward pass.

    Attributes:
        logits: float32 ``[n, vocab]``, of the segments that sample and have not failed, in order.
        failed: segments that could not be computed, by index, with the reason.
    """

    logits: Tensor
    failed: Mapping[int, str]


class Runner:
    """A model with its KV caches.

    Args:
        model: what to run.
        blocks, block_size: of the KV cache.

    Raises:
        UnsupportedModelError: the model cannot be run with its weights laid out for inference.
    """

    def __init__(self, model: LoadedModel, blocks: int, block_size: int) -> None:
        self._module: PreTrainedModel | None = model.module
        self._vocab_size = model.vocab_size
        self._device = model.device
        self._block_size = block_size
        self._stage = Stage()
        self._attached: list[nn.Module] = []
        try:
            self._attach(model.sites, blocks)
            # What is built at first use is then built before the first request, and a model that
            # looks into its linear layers, whose weights look different by now, says so here.
            self._rehearse(0)
        except AttributeError as error:
            self.close()
            raise UnsupportedModelError(model.config.model_type, str(error)) from error
        except BaseException:
            # Nobody else could, and the model would be lost to all other engines.
            self.close()
            raise

    @property
    def layers(self) -> list[PagedLayer]:
        """The KV caches, in the order of the model's attention layers."""
        return [attached(module) for module in self._attached]

    def close(self) -> None:
        """Give the KV caches back, and let go of the model.  Idempotent."""
        while self._attached:
            detach(self._attached.pop())
        self._module = None

    def run(self, steps: Steps, step: Step) -> Computed:
        """Compute a step; where that fails, find out whose fault it is.

        Every segment is then computed by itself.  That is sound, since a token's KV may be
        written any number of times before the step is over.

        Args:
            steps: who made the step.
            step: at least one token.

        Raises:
            RuntimeError: all of several segments fail, or one alone and then a token of
                nobody's too, so the fault is not a request's.
        """
        try:
            logits = self._logits(step.inputs)
        except _FAULTS as error:
            count = len(step.ids)
            _log.exception("a step of %d requests failed; trying each alone", count)
            logits, failed = self._each(steps, step)
            if len(failed) == count and (count > 1 or self._is_dead(int(step.inputs.slots[0]))):
                msg = f"no request of a step could be computed: {error}"
                raise RuntimeError(msg) from error
            return Computed(logits, failed)
        return _without_nan(logits, step.sampling)

    def _attach(self, sites: Sequence[AttentionSite], blocks: int) -> None:
        """Put a KV cache behind each of the model's attention layers."""
        for site in sites:
            layer = PagedLayer(
                self._stage,
                (blocks, site.kv_heads, self._block_size),
                site.key_dim,
                site.value_dim,
                site.dtype,
                self._device,
            )
            attach(site.module, layer)
            self._attached.append(site.module)

    def _is_dead(self, slot: int) -> bool:
        """Whether not even a token of nobody's can be computed; the slot is lost.

        After some errors of a GPU all work of the process fails, and engines that are to be
        started anew are those that raise.
        """
        try:
            self._rehearse(slot)
        except _FAULTS:
            return True
        return False

    def _rehearse(self, slot: int) -> None:
        """Run one token whose KV goes to a slot, and wait for it."""
        zero = torch.zeros(1, dtype=torch.int32, device=self._device)
        one = zero + 1
        self._stage.slots = zero.long() + slot
        table = zero[None] + slot // self._block_size
        self._stage.batch = PagedBatch(torch.cat((zero, one)), one, table)
        self._forward(zero.long(), zero.long(), zero.long()).cpu()

    def _forward(self, tokens: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        if self._module is None:
            msg = "the engine is closed"
            raise RuntimeError(msg)
        with torch.inference_mode():
            output = self._module(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=keep,
            )
            logits: Tensor = output.logits[0].float()
        return logits

    def _each(self, steps: Steps, step: Step) -> tuple[Tensor, dict[int, str]]:
        parts = [torch.empty((0, self._vocab_size), device=self._device)]
        failed: dict[int, str] = {}
        for index in range(len(step.ids)):
            sampling = step.sampling[index : index + 1]
            try:
                part = self._logits(steps.pack(step.segments.only(index), sampling))
            except _FAULTS as error:
                failed[index] = f"the forward pass failed: {error}"
                continue
            alone = _without_nan(part, sampling)
            parts.append(alone.logits)
            if alone.failed:
                failed[index] = _NOT_A_NUMBER
        return torch.cat(parts), failed

    def _logits(self, inputs: Inputs) -> Tensor:
        """One forward pass: float32 ``[len(inputs.keep), vocab]``."""
        self._stage.slots = self._on_device(inputs.slots)
        self._stage.batch = PagedBatch(
            query_start=self._on_device(inputs.query_start),
            context=self._on_device(inputs.context),
            block_table=self._on_device(inputs.table),
        )
        wanted = len(inputs.keep)
        # One row is computed and thrown away: not every output layer takes none.
        keep = inputs.keep if wanted else np.zeros(1, dtype=np.int64)
        tokens, positions = self._on_device(inputs.tokens), self._on_device(inputs.positions)
        return self._forward(tokens, positions, self._on_device(keep))[:wanted]

    def _on_device(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _without_nan(logits: Tensor, sampling: Mask) -> Computed:
    """Leave out rows that are not numbers; ``sampling`` says which segments they are of.

    One column tells: a NaN anywhere in a token's hidden state makes all its logits NaN.
    """
    lost = np.isnan(logits[:, 0].cpu().numpy())
    if not lost.any():
        return Computed(logits, {})
    segments = np.flatnonzero(sampling)[lost].tolist()
    return Computed(logits[torch.from_numpy(~lost)], dict.fromkeys(segments, _NOT_A_NUMBER))
