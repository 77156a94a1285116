"""From a request body to token ids, off the event loop when the text is long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from penstock.core.types import RequestError
from penstock.server.errors import invalid
from penstock.server.requests import ChatBody, CompletionBody, token_ids
from penstock.text.tokenizer import TextTokenizer

_Ids = TypeVar("_Ids")

# Tokenizing this many characters takes about a millisecond; longer texts go to a thread.
_LONG_TEXT = 4096
# What a text or a message costs besides, in characters: even empty ones take their time.
_EACH = 64


async def chat_prompt(text: TextTokenizer, body: ChatBody) -> list[list[int]]:
    """The one prompt of a chat request.

    Raises:
        ApiError: 400, the conversation does not fit the model's template.
    """
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    length = sum(_EACH + len(message["content"]) for message in messages)
    return [await _tokenize(lambda: text.apply_chat_template(messages), length)]


async def completion_prompts(text: TextTokenizer, body: CompletionBody) -> list[list[int]]:
    """The prompts of a completion request.

    Raises:
        ApiError: 400, a token id is out of range or a prompt is empty.
    """
    prompts = [
        list(token_ids("prompt", prompt, text.vocab_size))
        for prompt in body.prompt
        if not isinstance(prompt, str)
    ]
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if texts:
        length = sum(_EACH + len(prompt) for prompt in texts)
        prompts = await _tokenize(lambda: [text.encode(prompt) for prompt in texts], length)
    if not all(prompts):
        raise invalid("prompt", "prompt has no tokens; it must have at least one")
    return prompts


async def _tokenize(tokenize: Callable[[], _Ids], length: int) -> _Ids:
    try:
        if length > _LONG_TEXT:
            return await asyncio.to_thread(tokenize)
        return tokenize()
    except RequestError as error:
        raise invalid(error.field, str(error)) from None
