"""From a request body to token ids, off the event loop when the text is long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from penstock.core.types import RequestError
from penstock.server.errors import invalid
from penstock.server.requests import ChatBody, CompletionBody, token_ids
from penstock.text.tokenizer import TextTokenizer

_Source = TypeVar("_Source")

# Tokenizing this many characters takes about a millisecond; longer texts go to a thread.
_LONG_TEXT = 4096


async def chat_prompt(text: TextTokenizer, body: ChatBody) -> list[list[int]]:
    """The one prompt of a chat request.

    Raises:
        ApiError: 400, the conversation does not fit the model's template.
    """
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    length = sum(len(message["content"]) for message in messages)
    return [await _tokenize(text.apply_chat_template, messages, length)]


async def completion_prompts(text: TextTokenizer, body: CompletionBody) -> list[list[int]]:
    """The prompts of a completion request.

    Raises:
        ApiError: 400, a token id is out of range or a prompt is empty.
    """
    prompts: list[list[int]] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            prompts.append(await _tokenize(text.encode, prompt, len(prompt)))
        else:
            prompts.append(list(token_ids("prompt", prompt, text.vocab_size)))
    if not all(prompts):
        raise invalid("prompt", "prompt has no tokens; it must have at least one")
    return prompts


async def _tokenize(
    tokenize: Callable[[_Source], list[int]], source: _Source, length: int
) -> list[int]:
    try:
        if length > _LONG_TEXT:
            return await asyncio.to_thread(tokenize, source)
        return tokenize(source)
    except RequestError as error:
        raise invalid(error.field, str(error)) from None
