"""Where models are: a folder, the embedded demo model, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

DEMO = "demo"
"""What to write for the embedded model."""

_NEEDED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_SHARD = re.compile(r".*-\d+-of-(\d+)\.safetensors")


class ModelNotFoundError(FileNotFoundError):
    """There is no model of that name."""


def demo_path() -> Path:
    """Return the folder of the embedded model, in the layout of a Hugging Face checkpoint.

    It holds ``config.json``, ``generation_config.json``, ``model.safetensors``, ``tokenizer.json``
    and ``tokenizer_config.json``, its model card ``README.md`` and the ``LICENSES`` of its texts.
    """
    return Path(__file__).parent / DEMO


def model_path(model: str | Path) -> Path:
    """The folder of a model.

    A hub name is looked up in the local cache first, and fetched otherwise (not with
    ``HF_HUB_OFFLINE=1``): safetensors, configuration and tokenizer, and nothing that could run.

    Args:
        model: a folder, ``demo``, or a name such as ``org/model``.

    Raises:
        ModelNotFoundError: there is none; it says what was tried.
    """
    if model == DEMO:
        return demo_path()
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = str(model)
    try:
        with suppress(LocalEntryNotFoundError):
            # Without the patterns it would miss the files that were never fetched.
            cached = snapshot_download(name, allow_patterns=_NEEDED, local_files_only=True)
            if _has_weights(Path(cached)):
                return Path(cached)
        return Path(snapshot_download(name, allow_patterns=_NEEDED))
    except HFValidationError:
        reason = "is no folder, and no name that the hub could have"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"is no folder, and the hub did not give it: {error}"
    msg = f"model {name!r} {reason}; give a model's folder, a hub name, or {DEMO!r}"
    raise ModelNotFoundError(msg)


def _has_weights(folder: Path) -> bool:
    """Whether they are all there: a fetch that was cut leaves a snapshot that looks like any."""
    names = [path.name for path in folder.glob("*.safetensors")]
    shards = [int(match[1]) for match in map(_SHARD.fullmatch, names) if match]
    return len(names) >= max(shards, default=1)
