"""From a request's tokens to the text that may be sent: detokenizing, then stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.text.detokenizer import Detokenizer
from penstock.text.stop import StopStrings
from penstock.text.tokenizer import TextTokenizer


class TextStream:
    """The text of one request, as it grows.

    Args:
        tokenizer: what the ids belong to.
        stop: strings that end the text; the text stops before them.
        skip_special_tokens: leave special tokens out of the text.
        prompt: ids before the output, where its text continues theirs (plain completions);
            see :class:`~penstock.text.detokenizer.Detokenizer`.

    Raises:
        ValueError: a stop string is empty.

    Attributes:
        length: characters of the text so far, what is held back for a stop string included.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokens = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, prompt=prompt
        )
        self._stops = StopStrings(stop)
        self.length = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text is complete."""
        return self._stops.matched is not None

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """Take in a token and return the text that may be sent now; nothing once stopped."""
        if self.stopped:
            return ""
        text = self._tokens.push(token_id)
        self.length += len(text)
        return self._stops.push(text)

    def finish(self) -> str:
        """Return the text that was held back: no more tokens will come.

        It may hold a stop string, which then counts as found.
        """
        if self.stopped:
            return ""
        return self._stops.push(self._tokens.finish()) + self._stops.finish()
