"""From a checkpoint, or a bare configuration, to a model that is ready for the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from penstock.engine import kernels
from penstock.engine.attention import NAME
from penstock.engine.errors import CheckpointError, UnsupportedModelError
from penstock.engine.fusion import fuse
from penstock.engine.probe import AttentionSite, probe
from penstock.engine.support import TESTED_TYPES, check_config
from penstock.models import demo_path

_log = getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Number formats by name."""

DEMO = "demo"
"""Name of the model that comes with the package."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that calls our attention, and what the engine needs to know of it.

    Attributes:
        module: the model, in inference mode.
        config: its (text) configuration.
        sites: its attention layers.
        vocab_size: width of its logits.
        tokens_in: token ids that it takes are below this.
        eos_ids: tokens at which it ends by itself.
        parameters: how many it has.
        dtype: of its weights.
    """

    module: PreTrainedModel
    config: PreTrainedConfig
    sites: tuple[AttentionSite, ...]
    vocab_size: int
    tokens_in: int
    eos_ids: frozenset[int]
    parameters: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.module.device

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that a token's keys and values take."""
        return sum(
            site.kv_heads * (site.key_dim + site.value_dim) * site.dtype.itemsize
            for site in self.sites
        )


def load_model(model: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a causal language model from safetensors.

    Args:
        model: a folder, a name on the Hugging Face hub (looked up in the local cache only when
            ``HF_HUB_OFFLINE`` is set), or ``demo``.
        dtype: ``auto`` is the checkpoint's own, but float32 on a CPU that computes it slowly:
            float16 on all, bfloat16 where there are no vector instructions for it.
        device: ``auto`` is the first GPU if there is one.

    Raises:
        CheckpointError: it is not there, not complete, or not in safetensors.
        UnsupportedModelError: it cannot run here correctly.
        ValueError: ``dtype`` is unknown.
    """
    where = resolve_device(device)
    source = str(demo_path()) if model == DEMO else model
    try:
        config = AutoConfig.from_pretrained(source)
        _check_class(config)
        with _without_progress_bar():
            made = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=resolve_dtype(dtype, config, where),
                attn_implementation=NAME,
                use_safetensors=True,
                output_loading_info=True,
            )
        module, report = cast("tuple[PreTrainedModel, dict[str, Collection[object]]]", made)
        _check_complete(model, report)
        eos_ids = _eos_ids(module, source)
    except (UnsupportedModelError, CheckpointError):
        raise
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(_explain(model, source, error)) from error
    loaded = prepare(module, where, eos_ids)
    if config.model_type not in TESTED_TYPES:
        _log.warning(
            "model type %r is not among those whose output is tested; compare some of it",
            config.model_type,
        )
    return loaded


def load_random(
    config: PreTrainedConfig, *, seed: int = 0, dtype: str = "float32", device: str = "cpu"
) -> LoadedModel:
    """Make a model with random weights, for tests and measurements.

    Raises:
        UnsupportedModelError: it cannot run here correctly.
        ValueError: ``dtype`` is unknown.
    """
    where = resolve_device(device)
    module = random_module(config, seed, resolve_dtype(dtype, config, where), NAME)
    return prepare(module, where, _as_ids(config.eos_token_id))


def random_module(
    config: PreTrainedConfig, seed: int, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """A model whose weights depend on nothing but the configuration and the seed."""
    _check_class(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    module.eval()
    return module


def prepare(module: PreTrainedModel, device: torch.device, eos_ids: frozenset[int]) -> LoadedModel:
    """Probe a model that was made with our attention, and lay its weights out for inference.

    Raises:
        UnsupportedModelError: it cannot run here correctly.
    """
    nn.Module.to(module, device)
    module.eval().requires_grad_(requires_grad=False)
    probed = probe(module)
    embeddings = module.get_input_embeddings()
    tokens_in = int(getattr(embeddings, "num_embeddings", probed.logits))
    # Before the linear layers are packed: those are no parameters any more.
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if module.device.type == "cpu":
        fuse(module)
        kernels.prepack(module)
    return LoadedModel(
        module=module,
        config=module.config,
        sites=probed.sites,
        vocab_size=probed.logits,
        tokens_in=min(tokens_in, probed.logits),
        eos_ids=eos_ids,
        parameters=parameters,
        dtype=module.dtype,
    )


def resolve_device(device: str) -> torch.device:
    """The device that a setting means.

    Raises:
        ValueError: PyTorch knows none of this name, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in {"cpu", "cuda"}:
        msg = f"device is {device!r}; it must be auto, cpu, cuda or cuda:N"
        raise ValueError(msg)
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        msg = f"device is {device!r}, but PyTorch sees {torch.cuda.device_count()} NVIDIA GPUs"
        raise ValueError(msg)
    return where


def resolve_dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The number format that a setting means for a checkpoint.

    Raises:
        ValueError: it is unknown.
    """
    if dtype == "auto":
        own = config.dtype or torch.float32
        if isinstance(own, str):
            own = DTYPES.get(own, torch.float32)
        slow = own is torch.float16 or (own is torch.bfloat16 and not kernels.has_bfloat16())
        return torch.float32 if slow and device.type == "cpu" else own
    if dtype not in DTYPES:
        msg = f"dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}"
        raise ValueError(msg)
    return DTYPES[dtype]


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_class(config: PreTrainedConfig) -> None:
    check_config(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(config.model_type, "it is not a causal language model")
    model_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if not model_class.is_backend_compatible():
        reason = "it does not declare support for attention back ends"
        raise UnsupportedModelError(config.model_type, reason)


def _check_complete(model: str, report: Mapping[str, Collection[object]]) -> None:
    """Refuse what transformers would fill up with random weights."""
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has wrong shapes for")):
        names = sorted(str(name) for name in report[kind])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            msg = f"the checkpoint of model {model!r} {what} {', '.join(names[:3])}{more}"
            raise CheckpointError(msg)


def _eos_ids(module: PreTrainedModel, source: str) -> frozenset[int]:
    """Where the model ends, by its generation settings and by its tokenizer."""
    ids = _as_ids(getattr(module.generation_config, "eos_token_id", None))
    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    if cached_file(source, "tokenizer_config.json", **missing_is_none) is not None:
        ids |= _as_ids(AutoTokenizer.from_pretrained(source).eos_token_id)
    return ids


def _as_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _explain(model: str, source: str, error: Exception) -> str:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        if pickled:
            return (
                f"model {model!r} has only pickled weights ({', '.join(pickled[:3])}), which can "
                "run code when loaded; convert them to safetensors"
            )
        return f"model {model!r}: there is no .safetensors file in {folder}"
    reason = " ".join(str(error).split())
    return f"model {model!r} cannot be loaded: {reason}"
