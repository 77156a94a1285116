"""The dispatcher's own records: requests, what was sent together, and instances."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from penstock.core.policies.dispatch import InstanceView
from penstock.core.policies.move.by_gain import Stay
from penstock.core.types import Request, RequestId, Role


@dataclass(slots=True, eq=False)
class Sent:
    """A batch at an instance, and how many of it have not come back."""

    instance: int
    seconds: float
    left: int


@dataclass(slots=True, eq=False)
class Member:
    """A request, from its arrival to its end.

    Attributes:
        generated: output tokens that it has, as far as known.
        stays: at instances, so far.
        slice_id: name of the present stay.
        sent: the batch of the present stay.
        placed_with: output tokens that it began the stay with.
        target: the instance that it moves to.
        kv: tokens whose KV is in hand, on its way to a decode instance; 0: none.
        bound: the decode instance that its KV goes to while its prefill goes on.
        first_token: when its first token came, in seconds.
    """

    request: Request
    generated: int
    stays: int = 0
    slice_id: RequestId | None = None
    sent: Sent | None = None
    placed_with: int = 0
    target: int | None = None
    kv: int = 0
    bound: int | None = None
    first_token: float | None = None

    @property
    def row(self) -> tuple[int, int, int]:
        """(prompt, generated, cap) in tokens."""
        return self.request.prompt_tokens, self.generated, self.request.cap

    def begin(self, name: RequestId, sent: Sent, tokens: int, batch: int) -> Request:
        """Begin a stay of at most so many output tokens, with the KV in hand, if any."""
        self.slice_id, self.sent = name, sent
        self.placed_with, self.target = self.generated, None
        computed, self.kv = self.kv, 0
        return replace(
            self.request,
            id=name,
            generated=self.generated,
            cap=min(self.request.cap, self.generated + tokens),
            batch=batch,
            computed=computed,
            first_token=self.first_token,
        )


@dataclass(slots=True, eq=False)
class Instance:
    """An instance, who is there, and who is bound for it."""

    number: int
    kv_tokens: int
    role: Role
    load: float = 0.0
    members: dict[RequestId, Member] = field(default_factory=dict)
    coming: dict[RequestId, Member] = field(default_factory=dict)

    def stays(self) -> list[Stay]:
        """Those who may move."""
        return [
            Stay(
                member.slice_id or "",
                member.request.prompt_tokens,
                member.generated,
                member.request.cap,
                member.generated - member.placed_with,
            )
            for member in self.members.values()
            if member.target is None
        ]

    def rows(self) -> list[tuple[int, int, int]]:
        """(prompt, generated, cap) of each, in tokens."""
        return [member.row for them in (self.members, self.coming) for member in them.values()]

    def view(self) -> InstanceView:
        """What policies see."""
        count = len(self.members) + len(self.coming)
        return InstanceView(self.number, count, self.load, self.kv_tokens, self.rows, self.role)
