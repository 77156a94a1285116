"""Request bodies: what a router must understand, and what cannot be continued over slices.

Everything else is passed on untouched, for the backends to take or to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from penstock.router.failures import NOT_JSON
from penstock.server.errors import ApiError, invalid

DEFAULT_TOKENS = 16
_SEEDS = 1 << 63
# The router looks for every one of them in every piece of text.
_MOST_STOPS = 64
_LONGEST_STOP = 1024


def _absent(value: Any) -> bool:
    return value is None or value is False


def _empty(value: Any) -> bool:
    return not value


def _one(value: Any) -> bool:
    return value is None or value == 1


def _plain(value: Any) -> bool:
    return not value or value == {"type": "text"}


_WORDS = (
    "echo suffix use_beam_search presence_penalty frequency_penalty return_token_ids"
    " return_tokens_as_token_ids include_stop_str_in_output truncate_prompt_tokens prompt_embeds"
    " structured_outputs guided_json guided_regex guided_choice guided_grammar kv_transfer_params"
)
UNCONTINUABLE: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "n": _one,
        "best_of": _one,
        "logprobs": _absent,
        "prompt_logprobs": _absent,
        "response_format": _plain,
        **dict.fromkeys(_WORDS.split(), _empty),
    }
)
"""Fields whose effect reaches over a slice's end, and which of their values have no effect."""

_LEFT: Mapping[str, int] = MappingProxyType({"min_tokens": 0, "trace_output_tokens": 1})
"""Fields that count output tokens from the beginning, and the least they can be."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion request that can be continued.

    Attributes:
        fields: what is passed on, without prompt, cap, stop strings and streaming.
        cap: most output tokens.
        stop: strings that end the output; found by the router, in the joined text.
    """

    fields: Mapping[str, Any]
    prompt: str | list[int]
    cap: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    def slice_body(
        self, prompt: str | list[int], tokens: int, generated: int, *, ids: bool
    ) -> bytes:
        """The body that asks a backend for a slice.

        Args:
            prompt: all that is known so far: the client's prompt and the output.
            tokens: most output tokens of the slice.
            generated: output tokens so far.
            ids: ask for token ids.
        """
        body = {**self.fields, "prompt": prompt, "max_tokens": tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if ids:
            body["return_token_ids"] = True
        if generated:
            for name, least in _LEFT.items():
                if type(body.get(name)) is int:
                    body[name] = max(least, body[name] - generated)
            if type(body.get("seed")) is int:
                # The same seed again would draw the same numbers again.
                body["seed"] = (body["seed"] + generated) % _SEEDS
        return msgspec.json.encode(body)


def decode(raw: bytes, models: Collection[str]) -> dict[str, Any]:
    """A JSON object that names a model that is served.

    Raises:
        ApiError: 400 or 404, naming the field.
    """
    try:
        body = msgspec.json.decode(raw)
    except NOT_JSON as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    model = body.get("model")
    if not isinstance(model, str):
        raise invalid("model", "model is required, as a string", "missing_required_parameter")
    if model not in models:
        msg = f"model {model!r} does not exist; the backends have {', '.join(sorted(models))}"
        raise ApiError(404, msg, code="model_not_found", param="model")
    return body


def fault(body: Mapping[str, Any]) -> str | None:
    """The first field that cannot be continued over slices."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not _is_ids(_only(prompt)) and not _is_text(_only(prompt)):
        return "prompt"
    known = UNCONTINUABLE.items()
    return next((name for name, neutral in known if not neutral(body.get(name))), None)


def cap_of(body: Mapping[str, Any]) -> int:
    """Most output tokens that a completion asks for.

    Raises:
        ApiError: 400.
    """
    cap = body.get("max_tokens")
    if cap is None:
        return DEFAULT_TOKENS
    if type(cap) is not int or cap < 1:
        raise invalid("max_tokens", f"max_tokens is {cap!r}; it must be an integer of at least 1")
    return cap


def parse(body: Mapping[str, Any]) -> Completion:
    """A completion without a :func:`fault`.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = {name: value for name, value in body.items() if name not in UNCONTINUABLE}
    prompt = _only(fields.pop("prompt", None))
    if not _is_text(prompt) and not _is_ids(prompt):
        msg = f"prompt is {_shown(prompt)}; it must be a string or a list of token ids"
        raise invalid("prompt", msg)
    cap = cap_of(body)
    fields.pop("max_tokens", None)
    stops = _stops(fields.pop("stop", None))
    stream = fields.pop("stream", None)
    if stream not in (None, True, False):
        raise invalid("stream", f"stream is {_shown(stream)}; it must be true or false")
    usage = _include_usage(fields.pop("stream_options", None), stream=bool(stream))
    return Completion(fields, prompt, cap, stops, bool(stream), usage)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else (stop or [])
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        msg = f"stop is {_shown(stop)}; it must be a string that is not empty, or a list of these"
        raise invalid("stop", msg)
    if len(stops) > _MOST_STOPS:
        msg = f"stop is a list of {len(stops)} strings; it must have at most {_MOST_STOPS}"
        raise invalid("stop", msg)
    longest = max(map(len, stops), default=0)
    if longest > _LONGEST_STOP:
        msg = f"stop has a string of {longest} characters; it must have at most {_LONGEST_STOP}"
        raise invalid("stop", msg)
    return tuple(stops)


def _include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options", "stream_options is only allowed when stream is true")
    if not isinstance(options, dict):
        raise invalid(
            "stream_options", f"stream_options is {_shown(options)}; it must be an object"
        )
    for name, value in options.items():
        if name != "include_usage" and value:
            param = f"stream_options.{name}"
            msg = f"{param} is not supported by this router"
            raise invalid(param, msg, "unsupported_parameter")
    return bool(options.get("include_usage"))


def _only(prompt: Any) -> Any:
    """A list of one prompt is that prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        return prompt[0]
    return prompt


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) and bool(prompt)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(item) is int for item in prompt)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
