"""vLLM's waiting queue, for a scheduler that is told elsewhere whose turn it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class WaitingSet(RequestQueue):
    """Who waits, in no order that means anything: Penstock's queue has the order.

    Anyone leaves it in constant time.
    """

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def add_request(self, request: Request) -> None:
        """One more waits."""
        self._requests[request.request_id] = request

    def prepend_request(self, request: Request) -> None:
        """One more waits."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """More wait."""
        for request in requests:
            self.add_request(request)

    def pop_request(self) -> Request:
        """Take the one that has waited longest."""
        request = self.peek_request()
        self.remove_request(request)
        return request

    def peek_request(self) -> Request:
        """The one that has waited longest."""
        if not self._requests:
            msg = "nobody waits"
            raise IndexError(msg)
        return next(iter(self._requests.values()))

    def remove_request(self, request: Request) -> None:
        """One waits no longer; those who do not wait are left alone."""
        self._requests.pop(request.request_id, None)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Some wait no longer."""
        for request in requests:
            self.remove_request(request)

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())
