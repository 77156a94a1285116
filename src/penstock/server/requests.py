"""Request bodies: what is accepted, in which range, and what is refused by name.

``null`` means "not given", as in OpenAI's API.  A field that is not listed
here is refused, so no parameter is ever ignored silently; the few that are
accepted without effect (``user``, ``metadata``, ``store: false``) cannot
change the output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from penstock.core.sampling import SamplingParams
from penstock.server.errors import ApiError, invalid

UNSUPPORTED = frozenset(
    "audio best_of echo function_call functions modalities parallel_tool_calls prediction"
    " reasoning_effort response_format service_tier store suffix tool_choice tools"
    " use_beam_search verbosity web_search_options".split()
)
_NOTHING: Mapping[str, float] = MappingProxyType({})
# One way to write each id: otherwise a small vocabulary could be biased a million times.
# At most so many digits: Python refuses to read numbers of some thousands.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,19}")
# How much of a key that a client made up is shown in a refusal.
_LONGEST_NAME = 80
_MANY = 64  # members, more than any object here has names for
MAX_CHOICES = 128
MAX_BIASES, _MOST_BIAS = 1 << 18, 100
MAX_LOGPROBS = 20
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

Milliseconds: TypeAlias = Annotated[float, Field(gt=0)]
NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    """What clients send; of many members that it has no names for, one is told."""

    model_config = _STRICT

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict) or len(data) <= _MANY:
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in data if name not in known), None)
        return {name: data[name] for name in data if name in known or name == unknown}


def _one_fault(fine: Callable[[Any], bool]) -> BeforeValidator:
    """Of an object with values that are not fine, keeps the first of them: only one is told.

    Args:
        fine: false only for values that are refused hereafter.
    """

    def keep(value: Any) -> Any:
        members = value.items() if isinstance(value, dict) else ()
        fault = next((name for name, member in members if not fine(member)), None)
        return value if fault is None else {fault: value[fault]}

    return BeforeValidator(keep)


class SLOFields(_Part):
    """The body's ``slo``: a class, bounds in milliseconds, or both."""

    class_: str | None = Field(None, alias="class")
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    gap_ms: Milliseconds | None = None
    e2e_ms: Milliseconds | None = None


class StreamOptions(_Part):
    """How a stream is dressed."""

    include_usage: bool = False


class ResponseFormat(_Part):
    """Only plain text is produced."""

    type: Literal["text"]


class CommonBody(_Part):
    """What chat and plain completions share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-_MOST_BIAS, le=_MOST_BIAS)]],
        _one_fault(lambda bias: type(bias) in {int, float} and abs(bias) <= _MOST_BIAS),
    ] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[NonEmpty], Field(max_length=4)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31)
    slo: SLOFields | None = None
    trace_output_tokens: int | None = Field(None, ge=1)
    user: str | None = None
    metadata: Annotated[dict[str, str], _one_fault(lambda word: isinstance(word, str))] | None = (
        None
    )
    store: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_stream(self) -> CommonBody:
        if self.stream_options is not None and not self.stream:
            msg = "stream_options is only allowed when stream is true"
            raise ValueError(msg)
        return self

    @property
    def cap(self) -> int | None:
        """Most output tokens, if the request says."""
        return self.max_tokens

    @property
    def top_logprobs_asked(self) -> int | None:
        """None: no log probabilities; k: the token's own and the top k."""
        return None

    def samplings(
        self, vocabulary: int, recommended: Mapping[str, float] = _NOTHING
    ) -> list[SamplingParams]:
        """Sampling parameters of each of ``n`` choices; those of a seeded request differ by seed.

        Args:
            vocabulary: number of token ids.
            recommended: what the model's makers recommend, for what the request does not say.

        Raises:
            ApiError: 400, a token id is not in the vocabulary.
        """
        said = self.model_fields_set

        def value(name: str) -> float:
            own: float = getattr(self, name)
            return own if name in said else recommended.get(name, own)

        first = SamplingParams(
            temperature=float(value("temperature")),
            top_p=float(value("top_p")),
            top_k=int(value("top_k")),
            min_p=float(value("min_p")),
            repetition_penalty=float(value("repetition_penalty")),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            logit_bias=self._bias(vocabulary),
            seed=None if self.seed is None else self.seed % (1 << 63),
            logprobs=self.top_logprobs_asked,
            stop_token_ids=token_ids("stop_token_ids", self.stop_token_ids, vocabulary),
            ignore_eos=self.ignore_eos,
        )
        if self.seed is None:
            return [first] * self.n
        seeds = [(self.seed + choice) % (1 << 63) for choice in range(self.n)]
        return [replace(first, seed=seed) for seed in seeds]

    def _bias(self, vocabulary: int) -> dict[int, float]:
        biases = {}
        for key, bias in self.logit_bias.items():
            if _TOKEN_ID.fullmatch(key) is None:
                msg = f"logit_bias has the key {key[:_LONGEST_NAME]!r}; keys must be token ids"
                raise invalid("logit_bias", f"{msg} without leading zeros")
            (token,) = token_ids("logit_bias", [int(key)], vocabulary)
            biases[token] = float(bias)
        return biases


class TextPart(_Part):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], Field(fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # An assistant message that a client echoes has many null members.
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: object) -> object:
        if isinstance(value, str):
            return [TextPart(type="text", text=value)]
        if not isinstance(value, list):
            msg = "it must be a string or a list of text parts"
            raise PydanticCustomError("content_type", msg)
        return value

    @property
    def text(self) -> str:
        """The content as one string."""
        return "".join(part.text for part in self.content)


class ChatBody(CommonBody):
    """Body of ``/v1/chat/completions``."""

    # A million faults take half a minute to be told, and only the first one is.
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            msg = "top_logprobs is only allowed when logprobs is true"
            raise ValueError(msg)
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            msg = "max_tokens and max_completion_tokens mean the same and must not differ"
            raise ValueError(msg)
        return self

    @property
    def cap(self) -> int | None:
        """Most output tokens, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_asked(self) -> int | None:
        """Alternatives per token, 0 for the token's own only."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(CommonBody):
    """Body of ``/v1/completions``."""

    prompt: list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    return_token_ids: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        prompts = [value] if isinstance(value, str) or _are_token_ids(value) else value
        if isinstance(prompts, list) and len(prompts) > MAX_CHOICES:
            msg = f"it has {len(prompts)} prompts; at most {MAX_CHOICES} are allowed"
            raise ValueError(msg)
        texts = isinstance(prompts, list) and all(isinstance(item, str) for item in prompts)
        ids = isinstance(prompts, list) and all(_are_token_ids(item) for item in prompts)
        if not prompts or not (texts or ids):
            msg = "it must be a string, a list of strings, token ids or a list of token id lists"
            raise ValueError(msg)
        return prompts

    @property
    def top_logprobs_asked(self) -> int | None:
        """Alternatives per token."""
        return self.logprobs


Body = TypeVar("Body", bound=CommonBody)


def parse(kind: type[Body], raw: bytes) -> Body:
    """A request body, checked.

    Raises:
        ApiError: 400, naming the first field at fault.
    """
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(data, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _first_fault(error) from None


def token_ids(param: str, values: list[int], vocabulary: int) -> tuple[int, ...]:
    """Token ids, checked against the vocabulary.

    Raises:
        ApiError: 400.
    """
    for value in values:
        if not 0 <= value < vocabulary:
            msg = f"{param} has token id {value}; it must be in [0, {vocabulary})"
            raise invalid(param, msg)
    return tuple(values)


def headers_of(raw: list[tuple[bytes, bytes]]) -> Mapping[str, str]:
    """Request headers by lower-case name."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}


def _are_token_ids(value: object) -> bool:
    # type() and not isinstance(): JSON's true is no token id.
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _first_fault(error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False)[0]
    param = _param(fault["loc"])
    field = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "missing":
        return invalid(param, f"{param} is required", "missing_required_parameter")
    if field in UNSUPPORTED:
        return invalid(param, f"{field} is not supported by this server", "unsupported_parameter")
    if fault["type"] == "extra_forbidden":
        param = _extra_param(fault["loc"])
        return invalid(param, f"{param} is not a parameter of this route", "unknown_parameter")
    if not param:
        message = str(fault["msg"]).removeprefix("Value error, ")
        return invalid(message.split(" ", 1)[0], message)
    value = repr(fault["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    message = str(fault["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should", "it must").replace("List should", "it must")
    code = "invalid_type" if fault["type"].endswith("_type") else "invalid_value"
    return invalid(param, f"{param} is {shown}: {message[0].lower()}{message[1:]}", code)


def _extra_param(location: tuple[int | str, ...]) -> str:
    # The client's own word, which may be anything, and is the very thing to be told.
    path, name = _param(location[:-1]), str(location[-1])[:_LONGEST_NAME]
    name = name if name.isidentifier() else repr(name)
    return f"{path}.{name}" if path else name


def _param(location: tuple[int | str, ...]) -> str:
    # Members of unions appear in pydantic's location by their type's name; clients know none of
    # these, and the field that holds the union says enough.
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            if part in ("str", "list") and path:
                break
            path += f".{part}" if path else part
        else:
            break
    return path
