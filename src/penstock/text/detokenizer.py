"""Token ids to text, one token at a time, at a constant cost per token.

A token has no text of its own: characters are spread over tokens (byte-level and
byte-fallback vocabularies), and a leading space is there or not depending on what stands
before it (sentencepiece).  So a short window of earlier tokens is decoded twice, without and
with the new ones, and the difference is the new text.  While a window ends in U+FFFD, which is
how decoders write an incomplete character, nothing is said.  Prior art: the prefix and read
offsets of vLLM and Text Generation Inference.

The pieces add up to ``tokenizer.decode(all ids)``.  One exception: in byte-fallback
vocabularies a malformed byte makes the decoder take back the characters next to it, which may
have been sent by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.text.tokenizer import TextTokenizer

_INCOMPLETE = "\ufffd"
_CONTEXT = 5
_MOST_PENDING = 16  # far more than the 4 tokens that the bytes of one character may take
_LONGEST_CHARACTER = 4


class Detokenizer:
    """The text of one request's output.

    Args:
        tokenizer: what the ids belong to.
        skip_special_tokens: leave out the tokens that the vocabulary calls special.
        prompt: with it, the text is a continuation of the prompt's: a leading space of the
            first token is kept.  Without it, the text is that of the output alone.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = self._context(prompt)
        self._sent = len(self._window)  # tokens of the window whose text is out
        self._known = self._decode(self._window)

    def push(self, token: int) -> str:
        """Take in a token and return the text that is now complete, perhaps none."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._known):
            if len(self._window) - self._sent > _MOST_PENDING:
                return self._give_up_waiting(text)
            return ""
        new = text[len(self._known) :]
        self._keep(self._sent)
        return new

    def finish(self) -> str:
        """Return what was held back, incomplete characters as U+FFFD."""
        new = self._decode(self._window)[len(self._known) :]
        self._keep(self._sent)
        return new

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from the beginning of a character on."""
        window: list[int] = []
        for size in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
            window = [token for token in prompt[-size:] if token not in self._skipped]
            if not self._decode(window).startswith(_INCOMPLETE):
                break
        return window

    def _give_up_waiting(self, text: str) -> str:
        """Send malformed bytes that no later token can complete, to bound the window.

        A cut is right if both sides alone give the same text as together.
        """
        for cut in range(len(self._window) - _LONGEST_CHARACTER, len(self._window)):
            left = self._decode(self._window[:cut])
            if left + self._decode(self._window[cut:]) == text:
                new = left[len(self._known) :]
                self._window = self._window[cut:]
                self._sent, self._known = 0, ""
                return new
        return ""

    def _keep(self, start: int) -> None:
        """Make the tokens from ``start`` on, all of them sent, the context of the next ones."""
        self._window = self._window[start:]
        self._sent = len(self._window)
        self._known = self._decode(self._window)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
