"""The JSON of answers: OpenAI's chat and plain completion objects, whole and as stream chunks.

Stream chunks are put together from a constant head and one encoded delta:
nothing but the delta is serialized per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from penstock.server.choice import Choice, LogprobEntry

encode = msgspec.json.encode
TokenText = Callable[[int], str]
_INCOMPLETE = "\ufffd"
_LEAST = -9999.0  # what OpenAI says for minus infinity, which JSON cannot
DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """One route's way of saying things."""

    def chunk(self, choice: Choice, text: str, logprobs: list[LogprobEntry]) -> bytes:
        """A server-sent event with what is new in a choice."""
        ...

    def last_chunk(self, choice: Choice) -> bytes:
        """A server-sent event with a choice's finish reason."""
        ...

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        """A server-sent event with usage and no choice."""
        ...

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> bytes:
        """The complete answer."""
        ...


class _Base:
    chunk_object = ""
    whole_object = ""

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        fingerprint: str,
        token_text: TokenText,
        *,
        with_usage: bool,
    ) -> None:
        self._head = {
            "id": response_id,
            "object": "",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._token_text = token_text
        opening = encode({**self._head, "object": self.chunk_object})[:-1]
        self._opening = b"data: " + opening + b',"choices":[{"index":'
        self._closing = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"

    def _chunk(
        self, choice: Choice, key: bytes, delta: bytes, logprobs: Any, finish: bytes = b"null"
    ) -> bytes:
        return b"".join(
            (
                self._opening,
                str(choice.index).encode(),
                key,
                delta,
                b',"logprobs":',
                b"null" if logprobs is None else encode(logprobs),
                b',"finish_reason":',
                finish,
                self._closing,
            )
        )

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        """See :class:`Shape`."""
        body = {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}
        return b"data: " + encode(body) + b"\n\n"

    def _whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> bytes:
        return encode(
            {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}
        )


class ChatShape(_Base):
    """``/v1/chat/completions``."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._greeted: set[int] = set()

    def chunk(self, choice: Choice, text: str, logprobs: list[LogprobEntry]) -> bytes:
        """See :class:`Shape`."""
        delta = encode(text)
        if choice.index in self._greeted:
            delta = b'{"content":' + delta + b"}"
        else:
            self._greeted.add(choice.index)
            delta = b'{"role":"assistant","content":' + delta + b"}"
        return self._chunk(choice, b',"delta":', delta, self._logprobs(logprobs))

    def last_chunk(self, choice: Choice) -> bytes:
        """See :class:`Shape`."""
        greeting = b"" if choice.index in self._greeted else b'"role":"assistant","content":""'
        return self._chunk(
            choice, b',"delta":', b"{" + greeting + b"}", None, encode(choice.finish_reason)
        )

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> bytes:
        """See :class:`Shape`."""
        items = []
        for choice in choices:
            text, logprobs = choice.take()
            message = {"role": "assistant", "content": text, "refusal": None}
            items.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": self._logprobs(logprobs),
                    "finish_reason": choice.finish_reason,
                }
            )
        return self._whole(items, usage)

    def _logprobs(self, entries: list[LogprobEntry]) -> dict[str, Any] | None:
        if not entries:
            return None
        content = [
            {
                **self._entry(entry.token, entry.logprob),
                "top_logprobs": [self._entry(*pair) for pair in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        # A token that is part of a character has no text of its own, and its bytes are not known.
        raw = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": raw}


class CompletionShape(_Base):
    """``/v1/completions``."""

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompts_shown: set[int] = set()

    def chunk(self, choice: Choice, text: str, logprobs: list[LogprobEntry]) -> bytes:
        """See :class:`Shape`."""
        finish = b"null" + self._more(choice)
        return self._chunk(choice, b',"text":', encode(text), self._logprobs(logprobs), finish)

    def last_chunk(self, choice: Choice) -> bytes:
        """See :class:`Shape`."""
        finish = encode(choice.finish_reason) + self._more(choice)
        return self._chunk(choice, b',"text":', b'""', None, finish)

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> bytes:
        """See :class:`Shape`."""
        items = []
        for choice in choices:
            text, logprobs = choice.take()
            items.append(
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": self._logprobs(logprobs),
                    "finish_reason": choice.finish_reason,
                    **self._ids(choice),
                }
            )
        return self._whole(items, usage)

    def _ids(self, choice: Choice) -> dict[str, Sequence[int]]:
        """Members of a choice for ``return_token_ids``, as in vLLM: the prompt's once."""
        if choice.prompt is None:
            return {}
        ids: dict[str, Sequence[int]] = {"token_ids": choice.take_ids()}
        if choice.index not in self._prompts_shown:
            self._prompts_shown.add(choice.index)
            ids["prompt_token_ids"] = choice.prompt
        return ids

    def _more(self, choice: Choice) -> bytes:
        ids = self._ids(choice)
        return b"," + encode(ids)[1:-1] if ids else b""

    def _logprobs(self, entries: list[LogprobEntry]) -> dict[str, Any] | None:
        if not entries:
            return None
        return {
            "tokens": [self._token_text(entry.token) for entry in entries],
            "token_logprobs": [max(entry.logprob, _LEAST) for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _alternatives(self, entry: LogprobEntry) -> dict[str, float]:
        # Of those with the same text the first, most likely one stays.
        found: dict[str, float] = {}
        for token, logprob in entry.top:
            found.setdefault(self._token_text(token), max(logprob, _LEAST))
        return found
