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
_MOST_UNCUT = 64  # where nothing tells what is malformed: the cost per token needs a bound
_LONGEST_CHARACTER = 4


class Detokenizer:
    """The text of one request's output.

    Args:
        tokenizer: what the ids belong to.
        skip_special_tokens: leave out the tokens that the vocabulary calls special.
        prompt: with it, the text is a continuation of the prompt's: a leading space of the
            first token is kept, and a character that the prompt breaks off in is said when the
            output completes it.  Without it, the text is that of the output alone.
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
        # Of the window's tokens, the first are those whose text is known: it is out already.
        self._window, self._sent = self._context(prompt)
        self._known = self._decode(self._window[: self._sent]).rstrip(_INCOMPLETE)
        # What is known if the output does not complete the character the prompt breaks off in.
        self._broken_off = self._decode(self._window)

    def push(self, token: int) -> str:
        """Take in a token and return the text that is now complete, perhaps none."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        new = self._new(text)
        if not new or text.endswith(_INCOMPLETE):
            if len(self._window) - self._sent > _MOST_PENDING:
                return self._give_up_waiting(text)
            return ""
        self._keep(self._sent)
        return new

    def finish(self) -> str:
        """Return what was held back, incomplete characters as U+FFFD."""
        new = self._new(self._decode(self._window))
        self._keep(self._sent)
        return new

    def _context(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The last tokens of the prompt, and how many of them are whole characters.

        They begin with a character, and if the prompt breaks off in one, its bytes are at the
        end.  (In byte-fallback vocabularies those bytes spoil the text of all bytes before them.)
        """
        end = prompt[-_CONTEXT - 2 * _LONGEST_CHARACTER :]
        tokens = [token for token in end if token not in self._skipped]
        for whole in range(len(tokens), max(-1, len(tokens) - _LONGEST_CHARACTER), -1):
            window = self._from_a_character(tokens[:whole])
            if not self._decode(window).endswith(_INCOMPLETE):
                return window + tokens[whole:], len(window)
        window = self._from_a_character(tokens)  # malformed bytes, or U+FFFD itself
        return window, len(window)

    def _from_a_character(self, tokens: list[int]) -> list[int]:
        """The last of these tokens, from the beginning of a character on."""
        for size in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
            if not self._decode(tokens[-size:]).startswith(_INCOMPLETE):
                return tokens[-size:]
        return tokens[-_CONTEXT - _LONGEST_CHARACTER + 1 :]

    def _new(self, text: str) -> str:
        """What of the window's text is not known."""
        known = self._broken_off if text.startswith(self._broken_off) else self._known
        return text[len(known) :]

    def _give_up_waiting(self, text: str) -> str:
        """Send malformed bytes that no later token can complete, to bound the window.

        A cut is right if both sides alone give the same text as together.  Where none is, all is
        sent in the end.
        """
        for cut in range(len(self._window) - _LONGEST_CHARACTER, len(self._window)):
            left = self._decode(self._window[:cut])
            if left + self._decode(self._window[cut:]) == text:
                new = self._new(left)
                self._window = self._window[cut:]
                self._sent, self._known, self._broken_off = 0, "", ""
                return new
        if len(self._window) - self._sent <= _MOST_UNCUT:
            return ""
        new = self._new(text)
        self._keep(len(self._window) - _CONTEXT)
        return new

    def _keep(self, start: int) -> None:
        """Make the tokens from ``start`` on, all of them sent, the context of the next ones."""
        self._window = self._window[start:]
        self._sent = len(self._window)
        self._known = self._broken_off = self._decode(self._window)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
