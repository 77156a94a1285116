"""What a caller hands to :class:`penstock.llm.LLM`, looked at before anything runs.

All raise :class:`~penstock.core.types.RequestError`, which names the argument.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from penstock.core.types import OnMiss, RequestError
from penstock.text import TextTokenizer
from penstock.text.chat import Message

_T = TypeVar("_T")
_MOST_ID = 1 << 31


def prompts_of(prompts: object, tokenizer: TextTokenizer) -> list[list[int]]:
    """Token ids of each prompt: one text, texts, or ids of each."""
    if isinstance(prompts, str):
        prompts = [prompts]
    form = "a text, texts, or the token ids of each prompt"
    return [
        _ids(f"prompts[{index}]", prompt, tokenizer)
        for index, prompt in enumerate(_sequence("prompts", prompts, form))
    ]


def chats_of(messages: object) -> list[list[Message]]:
    """Chats: one, or several."""
    form = "a list of messages, each with role and content, or a list of such lists"
    given = _sequence("messages", messages, form)
    several = bool(given) and not isinstance(given[0], Mapping)
    chats = []
    for chat in given if several else [given]:
        read = [one for one in _sequence("messages", chat, form) if isinstance(one, Mapping)]
        if not read or len(read) != len(_sequence("messages", chat, form)):
            raise _wrong("messages", chat, form)
        chats.append(read)
    return chats


def stops_of(stop: object) -> list[str]:
    """Texts that end an output: one, or several."""
    form = "a text or a list of texts, none of them empty"
    given = [stop] if isinstance(stop, str) else _sequence("stop", stop, form)
    stops = [one for one in given if isinstance(one, str) and one]
    if len(stops) != len(given):
        raise _wrong("stop", stop, form)
    return stops


_FORMS = {"int": "a whole number", "SLO": "an SLO", "SamplingParams": "SamplingParams"}


def each(name: str, value: object, kind: type[_T], count: int) -> list[_T]:
    """The values for all prompts: a sequence as it is, anything else as often as needed."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        values: list[object] = [value] * count
    elif len(value) == count:
        values = list(value)
    else:
        msg = f"{name} has {len(value)} entries for {count} prompts; give one for all, or one each"
        raise RequestError(name, msg)
    for one in values:
        # True is no number of tokens.
        if not isinstance(one, kind) or isinstance(one, bool):
            raise _wrong(name, one, f"{_FORMS[kind.__name__]}, or one for each prompt")
    return values  # type: ignore[return-value]


def caps_of(max_tokens: object, count: int) -> list[int]:
    """Most output tokens of each."""
    caps = each("max_tokens", max_tokens, int, count)
    for cap in caps:
        if cap < 1:
            raise _wrong("max_tokens", cap, "at least 1")
    return caps


def on_miss_of(value: object) -> OnMiss:
    """The choice, by itself or by its name."""
    try:
        return OnMiss(str(value))
    except ValueError:
        raise _wrong("on_miss", value, f"one of {', '.join(OnMiss)}") from None


def _ids(name: str, prompt: object, tokenizer: TextTokenizer) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        form = "a text or token ids"
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
            raise _wrong(name, prompt, form)
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise _wrong(name, prompt, form) from None
        for token in ids:
            if not 0 <= token < _MOST_ID:
                raise _wrong(name, token, "of token ids, which are at least 0")
    if not ids:
        msg = f"{name} has no tokens; it must have at least one"
        raise RequestError("prompts", msg)
    return ids


def _sequence(name: str, value: object, form: str) -> Sequence[object]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _wrong(name, value, form)
    return list(value)


def _wrong(name: str, value: object, form: str) -> RequestError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return RequestError(name.partition("[")[0], f"{name} is {shown}; it must be {form}")
