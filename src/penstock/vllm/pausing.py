"""A door before any admission policy, for vLLM's pause: those inside go on, nobody enters."""

from __future__ import annotations

from penstock.core.policies.base import AdmitPolicy, Answer, Defer, Judge
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended

_PAUSED = Defer("paused")


class Door:
    """The policy behind it answers while it is open.

    Attributes:
        closed: whether everybody is deferred.
    """

    def __init__(self, behind: AdmitPolicy) -> None:
        self._behind = behind
        self.closed = False

    @property
    def holds(self) -> int | None:
        """While closed, ask at every step: it may open at any time."""
        return 1 if self.closed else self._behind.holds

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        return _defer if self.closed else self._behind.judge(view)

    def observe(self, ended: Ended) -> None:
        """Learn from a request's end."""
        self._behind.observe(ended)

    def learn_true_length(self, request_id: str, length: int) -> None:
        """For the oracle only."""
        self._behind.learn_true_length(request_id, length)


def _defer(candidate: Candidate) -> Answer:
    del candidate
    return _PAUSED
