"""One request's output as it grows, slice by slice, and what a client has not read of it.

The last tokens of a slice may be part of a character, whose text a server says only with the
next token, or writes as U+FFFD when there is none.  So a piece without text, or that ends in
U+FFFD, is not settled before text follows it; what is not settled when a slice ends is dropped,
and made again by the next slice.  So the joined text is that of one long answer.  No more than a
character's tokens are dropped: a longer run has no text at all, and would be made again for ever.
"""

from __future__ import annotations

from penstock.router.backend import Piece
from penstock.router.body import Completion
from penstock.server.choice import Mailbox
from penstock.server.errors import ApiError
from penstock.text.stop import StopStrings

_INCOMPLETE = "\ufffd"
_CHARACTER = 8  # tokens; UTF-8 has up to four bytes for one, so this is twice what can be


class Answer:
    """What is known of a request's output.

    Args:
        body: the request.

    Attributes:
        generated: output tokens that are settled.
        prompt_tokens: by the backends' count; 0 until one has said.
        dropped: tokens at the end of the last slice that have to be made again.
        finish: the finish reason, at the end.
        error: why there is none.
        pending: text that has not been read.
        mailbox: rung when there is something to read.
    """

    def __init__(self, body: Completion) -> None:
        self.body = body
        self.generated = 0
        self.prompt_tokens = len(body.prompt) if isinstance(body.prompt, list) else 0
        self.dropped = 0
        self.finish: str | None = None
        self.error: ApiError | None = None
        self.mailbox = Mailbox()
        self._stops = StopStrings(body.stop)
        self._text = ""
        self._ids = list(body.prompt) if isinstance(body.prompt, list) else None
        self._loose: list[Piece] = []
        self._begin = self._asked = 0
        self._exact = True  # every piece of the slice said its ids
        self._counted = False  # the backend said how many tokens the slice has
        self.pending = ""

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; the prompt counts once."""
        prompt, output = self.prompt_tokens, self.generated
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }

    @property
    def full(self) -> bool:
        """Whether there are as many tokens as were asked for."""
        return self.generated >= self.body.cap

    def continuation(self) -> str | list[int]:
        """The next slice's prompt: token ids if all of them are known, else text.

        Raises:
            ApiError: 502, the prompt was ids and a backend has not returned any.
        """
        if self._ids is not None:
            return list(self._ids)
        if isinstance(self.body.prompt, str):
            return self.body.prompt + self._text
        msg = "a backend returned no token ids, so that the prompt cannot be continued"
        raise ApiError(502, msg, code="backend_failed", kind="server_error")

    def begin(self, tokens: int) -> None:
        """A slice of at most so many tokens begins."""
        self._begin, self._asked = self.generated, tokens
        self._exact, self._counted = True, False
        self._loose.clear()

    def take(self, piece: Piece) -> bool:
        """More of the slice; False once a stop string has come up: nothing more is needed."""
        if piece.prompt_ids and self._ids is None and self.generated == self._begin:
            self._ids = list(piece.prompt_ids)
            self._note_prompt(len(piece.prompt_ids))
        if piece.usage is not None:
            self._note_prompt(piece.usage[0])
            if not self._exact:
                self._counted = True
                self.generated = self._begin + piece.usage[1]
        if piece.text or piece.ids:
            self._loose += _singly(piece)
            self._exact &= piece.ids is not None
        if piece.text and not piece.text.endswith(_INCOMPLETE):
            self._settle()
        if self._stops.matched is not None:
            self._end("stop")
            return False
        return True

    def end_slice(self, finish: str | None) -> bool:
        """A slice is over; True if the request is.

        Args:
            finish: the backend's reason; None if it was cut.
        """
        if finish is None and self.full:
            finish = "length"
        if finish is None or (finish == "length" and not self._nothing_left()):
            self._drop()
            return False
        self.dropped = 0
        self._settle()
        matched = self._stops.matched is not None
        self._end("stop" if matched else finish)
        return True

    def give_up(self, error: ApiError) -> None:
        """Nobody goes on with it."""
        self.error = error
        self.mailbox.ring()

    def close(self) -> None:
        """It has as many tokens as can be, without a backend that said so."""
        self._end("length")

    def read(self) -> str:
        """Text since the last read."""
        text, self.pending = self.pending, ""
        return text

    def _nothing_left(self) -> bool:
        """Whether a slice that ended for its length is the last one.

        One that is shorter than it might have been has met a limit of the backend's.
        """
        loose = sum(len(piece.ids or ()) for piece in self._loose)
        gained = self.generated + loose - self._begin
        short = gained < self._asked if self._exact or self._counted else gained == 0
        return short or self._begin + gained >= self.body.cap

    def _note_prompt(self, tokens: int) -> None:
        """A slice's prompt has so many tokens: the client's, and the output before the slice."""
        self.prompt_tokens = self.prompt_tokens or max(0, tokens - self._begin)

    def _drop(self) -> None:
        """Forget what may be the beginning of a character, and settle what is before that."""
        at, self.dropped = len(self._loose), 0
        while at and self.dropped < _CHARACTER:
            at -= 1
            self.dropped += len(self._loose[at].ids or ())
        del self._loose[at:]
        self._settle()

    def _settle(self) -> None:
        for piece in self._loose:
            self._text += piece.text
            self.pending += self._stops.push(piece.text)
            if piece.ids is None:
                self._ids = None
                self.generated += not self._counted
            else:
                self.generated += len(piece.ids)
                if self._ids is not None:
                    self._ids.extend(piece.ids)
        self._loose.clear()
        if self.pending:
            self.mailbox.ring()

    def _end(self, finish: str) -> None:
        if self._stops.matched is None:
            self.pending += self._stops.finish()
        self.finish = finish
        self.mailbox.ring()


def _singly(piece: Piece) -> list[Piece]:
    """Tokens without text, which say nothing of each other, each by itself."""
    if piece.text or piece.ids is None:
        return [piece]
    return [Piece("", [token]) for token in piece.ids]
