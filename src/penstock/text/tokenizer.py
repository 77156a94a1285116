"""A model's tokenizer, loaded from its folder with the ``tokenizers`` library alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from penstock.core.sampling import SamplingParams
from penstock.core.types import RequestError
from penstock.text.chat import ChatTemplate, Message

# The library keeps the interpreter to itself while it encodes one text; not for a batch, which
# costs some microseconds more.
_LONG_TEXT = 4096
_RECOMMENDABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TextTokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: from the ``tokenizers`` library; its truncation and padding are switched off,
            since a prompt must never change silently.
        chat_template: the model's, if it has one.
        eos_ids: ids that end an output.
        sampling: what the model's makers recommend, by OpenAI's names of the parameters.

    Attributes:
        vocab_size: number of token ids, added ones included.  A model's logits may be wider.
        special_ids: ids that ``skip_special_tokens`` leaves out.
        eos_ids, sampling: as given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        eos_ids: Iterable[int] = (),
        sampling: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.sampling = MappingProxyType(dict(sampling))
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: FBT001, FBT002
        """Return the ids of a text.

        Args:
            text: any valid Unicode.
            add_special_tokens: add what the model expects around a text, such as a begin token.

        Raises:
            RequestError: the text holds half a surrogate pair, which no UTF-8 can carry.
        """
        try:
            if len(text) > _LONG_TEXT:
                (encoded,) = self._tokenizer.encode_batch_fast(
                    [text], add_special_tokens=add_special_tokens
                )
            else:
                encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            msg = "the text is not valid Unicode: it holds half a surrogate pair"
            raise RequestError("prompt", msg) from error
        ids: list[int] = encoded.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: FBT001, FBT002
        """Return the text of some ids; bytes that are no valid UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def printable_ids(self, most: int) -> tuple[int, ...]:
        """The first ids, at most so many, that are whole characters when they stand alone.

        Text of such tokens can be sent as soon as each comes.
        """
        found: list[int] = []
        for id_ in range(self.vocab_size):
            if len(found) == most:
                break
            if id_ not in self.special_ids and id_ not in self.eos_ids:
                text = self.decode([id_])
                if text and "\ufffd" not in text:
                    found.append(id_)
        return tuple(found)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        """Return the text that the model's chat template makes of a chat.

        Raises:
            RequestError: the model has no chat template, or it refuses these messages.
        """
        if self._chat_template is None:
            msg = "this model has no chat template; use plain completions with it"
            raise RequestError("messages", msg)
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002
    ) -> list[int]:
        """Return the ids of a chat; special tokens are the template's business.

        Raises:
            RequestError: the model has no chat template, or it refuses these messages.
        """
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load the tokenizer of a model folder in Hugging Face's layout.

    Reads ``tokenizer.json``, and where present ``tokenizer_config.json``,
    ``special_tokens_map.json``, ``chat_template.jinja``, ``generation_config.json`` and, for
    end-of-sequence ids that the latter does not name, ``config.json``.

    Raises:
        FileNotFoundError: the folder has no ``tokenizer.json``.
        ValueError: a file is not what it should be.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        msg = (
            f"{folder} has no tokenizer.json; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one"
        )
        raise FileNotFoundError(msg)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        msg = f"{file} is not a tokenizer that the tokenizers library can read: {error}"
        raise ValueError(msg) from error
    config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
    source = _template_source(folder, config)
    return TextTokenizer(
        tokenizer,
        chat_template=None if source is None else ChatTemplate(source, special),
        eos_ids=_eos_ids(folder, tokenizer, special),
        sampling=_sampling(folder / "generation_config.json"),
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{file} is not JSON: {error}"
        raise ValueError(msg) from error
    if not isinstance(value, dict):
        msg = f"{file} holds a {type(value).__name__}; it must be a JSON object"
        raise ValueError(msg)  # noqa: TRY004 - the content is wrong, not a caller's type
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens: plain strings, or objects with their text in ``content``."""
    texts = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        # Some models ship several, by name; "default" is the one for plain chats.
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _sampling(file: Path) -> dict[str, float]:
    """The sampling parameters that a model's makers recommend.

    Raises:
        ValueError: one is out of range.
    """
    configured = _read_json(file)
    found = {name: configured[name] for name in _RECOMMENDABLE if configured.get(name) is not None}
    try:
        SamplingParams(**found)
    except (ValueError, TypeError) as error:
        msg = f"{file}: {error}"
        raise ValueError(msg) from error
    return found


def _eos_ids(folder: Path, tokenizer: Tokenizer, special: Mapping[str, str]) -> list[int]:
    """What generation ends at: the model's configured ids, and the tokenizer's own end token."""
    configured = _read_json(folder / "generation_config.json").get("eos_token_id")
    if configured is None:
        configured = _read_json(folder / "config.json").get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return [id_ for id_ in (*ids, own) if id_ is not None]
