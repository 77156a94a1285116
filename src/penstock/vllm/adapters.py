"""As many LoRA adapters at a time as vLLM has places for, before any admission policy.

Problem: those that run together may need at most ``--max-loras`` adapters; a request for one more
has to wait for a place, whatever memory there is.  vLLM lets those behind it pass for as long as
they come; so it may wait for ever.
Source: our own; S-LoRA (arXiv 2311.03285) and SGLang let others pass, too.
Rule: it is skipped, and those behind it are asked; once it has waited for ``PATIENCE`` seconds
nobody passes it any more until a place is free.
Limits: nobody is evicted to make a place; those that wait are asked in every step.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.policies.base import AdmitPolicy, Answer, Defer, Judge, Skip
from penstock.core.snapshot import Candidate, Snapshot
from penstock.core.types import Ended, RequestId

PATIENCE = 5.0
"""Seconds from its arrival on in which others may pass one that waits for a place."""


class AdapterPlaces:
    """The policy behind it answers for those whose adapter has a place.

    Args:
        behind: it.
        most: adapters at a time.
        adapter_of: a request's adapter; 0: it needs none.
        running: requests that may be in the next step already.
    """

    def __init__(
        self,
        behind: AdmitPolicy,
        most: int,
        adapter_of: Callable[[RequestId], int],
        running: Callable[[], list[RequestId]],
    ) -> None:
        self._behind = behind
        self._most = most
        self._adapter_of = adapter_of
        self._running = running

    @property
    def holds(self) -> int | None:
        """As behind it: a place is free only when memory is given back, too."""
        return self._behind.holds

    def judge(self, view: Snapshot) -> Judge:
        """Open a pass."""
        placed = {self._adapter_of(request_id) for request_id in self._running()} - {0}
        behind: Judge | None = None

        def answer(candidate: Candidate) -> Answer:
            nonlocal behind
            adapter = self._adapter_of(candidate.request.id)
            if adapter and adapter not in placed:
                if len(placed) >= self._most:
                    reason = f"its LoRA adapter has no place: {len(placed)} are in use"
                    impatient = view.now - candidate.request.arrival >= PATIENCE
                    return Defer(reason) if impatient else Skip(reason)
                placed.add(adapter)
            if behind is None:  # not for those alone who are skipped in every step
                behind = self._behind.judge(view)
            return behind(candidate)

        return answer

    def observe(self, ended: Ended) -> None:
        """Learn from a request's end."""
        self._behind.observe(ended)

    def learn_true_length(self, request_id: RequestId, length: int) -> None:
        """For the oracle only."""
        self._behind.learn_true_length(request_id, length)
