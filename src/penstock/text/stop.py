"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string, wherever the pieces of text break.

    A match is the one that is complete first; of those complete at the same character, the
    longest.  So the result does not depend on how the text is cut into pieces.  The text
    ends before the match, as in the OpenAI API.  What may still become a match is held back.

    Args:
        stops: none of them empty; an empty sequence lets all text pass.

    Raises:
        ValueError: a stop string is empty.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            msg = "stop holds an empty string; each stop string needs at least one character"
            raise ValueError(msg)
        self.matched: str | None = None
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Take in more text and return what is now sure not to belong to a stop string.

        Everything after a match is dropped.
        """
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Return what was held back: no more text will come."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Where the longest ending of ``text`` begins that is the beginning of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return len(text)
