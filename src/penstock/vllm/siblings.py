"""Requests that are parts of one HTTP answer: if one is refused, nobody will get the others.

An answer has ``n`` choices for each of its prompts, and vLLM makes a request of each.  The
middleware gives them a common name and turns the first verdict into the whole answer's; so the
scheduler ends the others as well, instead of generating for nobody.
"""

from __future__ import annotations

from collections import OrderedDict

from penstock.core.types import RequestId
from penstock.vllm.verdict import Verdict

_REMEMBERED = 4096


class Siblings:
    """Who belongs to which answer, and which answers are over."""

    def __init__(self) -> None:
        self._members: dict[str, dict[RequestId, None]] = {}
        self._answers: dict[RequestId, str] = {}
        # Some of an answer's requests may come after its end.
        self._over: OrderedDict[str, Verdict] = OrderedDict()

    def join(self, request_id: RequestId, answer: str) -> Verdict | None:
        """One more request of an answer; the verdict, if the answer is over already."""
        self._members.setdefault(answer, {})[request_id] = None
        self._answers[request_id] = answer
        return self._over.get(answer)

    def told(self, request_id: RequestId) -> bool:
        """Whether whoever waits for it understands verdicts."""
        return request_id in self._answers

    def end(self, request_id: RequestId, verdict: Verdict) -> list[RequestId]:
        """One is ended by a verdict; the others that are to share it."""
        answer = self._answers.get(request_id)
        if answer is None or answer in self._over:
            return []
        self._over[answer] = verdict
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        return [one for one in self._members[answer] if one != request_id]

    def forget(self, request_id: RequestId) -> None:
        """It has ended."""
        answer = self._answers.pop(request_id, None)
        if answer is None:
            return
        members = self._members[answer]
        del members[request_id]
        if not members:
            del self._members[answer]
