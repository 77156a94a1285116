"""The mechanism for several instances: a pool, slices, batches, and who was sent where.

It decides nothing itself: a :class:`~penstock.core.policies.dispatch.DispatchPolicy` does.  What it
guarantees, whatever the policy answers: every request that was taken in is in the pool or at one
instance until it ends; what an instance held when it was lost is back in the pool with the tokens
that are known; and no slice reaches beyond its request's cap.

Where instances have roles, a request first goes to a prefill instance, for one token; whoever runs
the instances then has its KV in hand, and it goes on at a decode instance.  Whenever that KV is
lost, it begins again at a prefill instance, with the tokens that it has.

Like the scheduler of one instance it is told the time, does no I/O, and is the same object in the
simulator, in front of live instances, and in front of other servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from penstock.core.forecast.slices import SliceCost
from penstock.core.members import Instance, Member, Sent
from penstock.core.policies.back_pressure import Waiting
from penstock.core.policies.dispatch import DispatchPolicy, InstanceView
from penstock.core.types import FinishReason, Request, RequestId, Role

SliceId = RequestId
"""Name of one stay of a request at an instance: no two stays of a request have the same."""


class Batch(NamedTuple):
    """Requests to send to an instance together.

    Attributes:
        number: consecutive, from 1.
        requests: one slice of each: ``id`` names the slice, ``generated`` is what it has, ``cap``
            where the slice ends, ``batch`` the batch's number if it is to run as a static one.
        seconds: estimated; 0 where nobody estimates.
    """

    number: int
    instance: int
    requests: tuple[Request, ...]
    seconds: float


CostOf = Callable[[int], SliceCost]
"""Prices of slices on instances with so many KV tokens."""


class Dispatcher:
    """Sends requests to instances, a slice at a time.

    Args:
        policy: who answers.
        cost: prices of slices; needed if the policy ``needs_cost``.

    Raises:
        ValueError: there are no prices but the policy needs them.
    """

    def __init__(self, policy: DispatchPolicy, cost: CostOf | None = None) -> None:
        if policy.needs_cost and cost is None:
            msg = "this dispatch policy needs the prices of slices"
            raise ValueError(msg)
        self.policy = policy
        self._cost = cost
        self._instances: dict[int, Instance] = {}
        self._members: dict[RequestId, Member] = {}
        self._slices: dict[SliceId, Member] = {}
        self._pool: dict[RequestId, Member] = {}
        self._pooled_at = math.inf
        self._next = -math.inf
        self._next_move = -math.inf
        self._batches = 0
        self._decode_room = 0
        # Nobody in the pool can be sent before something ends or an instance comes.
        self._held = False

    @property
    def due(self) -> float:
        """When to call :meth:`dispatch`; infinity if there is nobody to send, or nowhere."""
        if not self._pool or self._held or not self._instances:
            return math.inf
        return max(self._next, self._pooled_at)

    @property
    def move_due(self) -> float:
        """When to call :meth:`moves`; infinity if nobody ever moves, or can."""
        if self.policy.move is None or len(self._instances) < 2 or not self._slices:
            return math.inf
        return self._next_move

    @property
    def pooled(self) -> int:
        """Requests that wait here."""
        return len(self._pool)

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._members)

    @property
    def instances(self) -> tuple[InstanceView, ...]:
        """The instances there are, by number."""
        return tuple(self._instances[number].view() for number in sorted(self._instances))

    def join(self, number: int, kv_tokens: int, role: Role = Role.MIXED) -> None:
        """An instance is there.

        Raises:
            ValueError: there is one of this number.
        """
        if number in self._instances:
            msg = f"instance {number} is there already"
            raise ValueError(msg)
        self._instances[number] = Instance(number, kv_tokens, role)
        self._note_decode_room()
        self._held = False

    def lose(self, number: int, now: float) -> tuple[RequestId, ...]:
        """An instance is gone: all it held goes back to the pool, before those who wait."""
        instance = self._instances.pop(number)
        self._note_decode_room()
        back = list(instance.members.values())
        waiting, self._pool = self._pool, {}
        for member in instance.coming.values():
            member.bound = None
        for member in back:
            self._detach(member)
            self._back_to_pool(member, now)
        self._pool.update(waiting)
        # Nobody should wait for an interval that was chosen by loads that are gone.
        self._next = min(self._next, now)
        return tuple(member.request.id for member in back)

    def add(self, request: Request, now: float) -> None:
        """Take a request in.

        Raises:
            ValueError: the id is in use.
        """
        if request.id in self._members:
            msg = f"request id {request.id!r} is in use"
            raise ValueError(msg)
        member = Member(request, request.generated)
        self._members[request.id] = member
        self._back_to_pool(member, now)

    def whole(self, slice_id: SliceId) -> RequestId | None:
        """Whose slice it is; None if that stay is over."""
        member = self._slices.get(slice_id)
        return None if member is None else member.request.id

    def progress(self, slice_id: SliceId, generated: int) -> None:
        """A request at an instance has so many output tokens by now."""
        member = self._slices.get(slice_id)
        if member is not None:
            member.generated = generated

    def hands_over(self, slice_id: SliceId) -> bool:
        """Whether the KV of this slice is to be kept when it ends, for a decode instance."""
        member = self._slices[slice_id]
        assert member.sent is not None
        instance = self._instances[member.sent.instance]
        return instance.role is Role.PREFILL and member.generated + 1 < member.request.cap

    def bind(self, slice_id: SliceId) -> int | None:
        """The decode instance that a slice's KV may go ahead to; None if there is none now."""
        member = self._slices[slice_id]
        if member.bound is None:
            views = [view for view in self.instances if view.role is Role.DECODE]
            if views:
                tokens = member.request.prompt_tokens + member.generated
                member.bound = views[self.policy.place.choose(views, tokens)].number
                self._instances[member.bound].coming[member.request.id] = member
        return member.bound

    def kv_lost(self, request_id: RequestId) -> None:
        """The KV that was in hand for a pooled request is gone."""
        member = self._pool.get(request_id)
        if member is not None:
            member.kv = 0
            self._unbind(member)
            self._held = False

    def refused(self, slice_id: SliceId, now: float) -> None:
        """An instance could not begin a slice: the KV that it was to bring is lost."""
        member = self._slices[slice_id]
        self._detach(member)
        self._back_to_pool(member, now)

    def ended(
        self,
        slice_id: SliceId,
        generated: int,
        reason: FinishReason,
        now: float,
        *,
        kv: bool = False,
    ) -> RequestId | None:
        """A slice came to its end at its instance.

        Args:
            kv: whether its KV is in hand.

        Returns:
            the request if it has ended with it; None if it goes on, from the pool.

        Raises:
            KeyError: no such slice is at an instance.
        """
        member = self._slices[slice_id]
        self._detach(member)
        member.generated = generated
        member.kv = member.request.prompt_tokens + generated - 1 if kv else 0
        if generated and member.first_token is None:
            member.first_token = now
        self._held = False
        moved = reason is FinishReason.CANCELLED and member.target is not None
        if moved or (reason is FinishReason.LENGTH and generated < member.request.cap):
            self._back_to_pool(member, now)
            return None
        self._unbind(member)
        del self._members[member.request.id]
        if reason in {FinishReason.STOP, FinishReason.LENGTH}:
            self.policy.place.observe(generated)
            if self.policy.back_pressure is not None:
                self.policy.back_pressure.observe(generated)
            if self.policy.move is not None:
                self.policy.move.history.observe(generated)
        return member.request.id

    def withdraw(self, request_id: RequestId) -> tuple[int, SliceId] | None:
        """End a request from outside; where it is, if it is at an instance, to end it there."""
        member = self._members.pop(request_id, None)
        if member is None:
            return None
        self._pool.pop(request_id, None)
        self._unbind(member)
        self._held = False
        if member.sent is None or member.slice_id is None:
            return None
        where = (member.sent.instance, member.slice_id)
        self._detach(member)
        return where

    def moves(self, now: float) -> list[tuple[int, SliceId]]:
        """Who is to leave its instance for another: end each there as cancelled.

        The ends come back through :meth:`ended`, and the requests go on elsewhere.
        """
        policy = self.policy.move
        if policy is None or len(self._instances) < 2:
            return []
        self._next_move = now + policy.every
        numbers = sorted(self._instances)
        stays = [self._instances[number].stays() for number in numbers]
        found = policy.moves(stays, self._price().model)
        for move in found:
            self._slices[move.slice_id].target = numbers[move.target]
        return [(numbers[move.source], move.slice_id) for move in found]

    def dispatch(self, now: float) -> list[Batch]:
        """Empty the pool: make batches and send each to an instance."""
        if not self._pool or not self._instances:
            return []
        waiting, self._pool = list(self._pool.values()), {}
        batches: list[Batch] = []
        # Those with KV in hand first: they hold memory on their way.
        with_kv = [member for member in waiting if member.kv]
        without = [member for member in waiting if not member.kv]
        for stage, there in ((Role.DECODE, with_kv), (Role.PREFILL, without)):
            views = [view for view in self.instances if view.role in {stage, Role.MIXED}]
            if there and views:
                going = self._may_begin(there, now) if stage is Role.PREFILL else there
                batches.extend(self._dispatch(going, views))
        self._pool = {each.request.id: each for each in waiting if each.sent is None}
        self._held = bool(self._pool)
        self._pooled_at = now if self._pool else math.inf
        loads = [instance.load for instance in self._instances.values()]
        self._next = now + self.policy.interval.seconds(loads)
        return batches

    def check(self) -> None:
        """Raise AssertionError if the books contradict themselves (in tests)."""
        placed = [m for instance in self._instances.values() for m in instance.members.values()]
        assert len(placed) + len(self._pool) == len(self._members)
        assert len(placed) == len(self._slices)
        bound = [member for member in self._members.values() if member.bound is not None]
        assert len(bound) == sum(len(each.coming) for each in self._instances.values())
        for member in placed:
            assert member.sent is not None
            assert member.sent.left > 0
        for instance in self._instances.values():
            assert all(member.bound == instance.number for member in instance.coming.values())
            sent = {id(m.sent): m.sent.seconds for m in instance.members.values() if m.sent}
            assert math.isclose(instance.load, sum(sent.values()), abs_tol=1e-6)

    def _price(self) -> SliceCost:
        """Prices that hold on every instance: of the one with the least memory."""
        assert self._cost is not None
        return self._cost(min(instance.kv_tokens for instance in self._instances.values()))

    def _note_decode_room(self) -> None:
        decode = [each for each in self._instances.values() if each.role is Role.DECODE]
        # While there is none, another is expected that is like the last.
        if decode:
            self._decode_room = sum(instance.kv_tokens for instance in decode)

    def _may_begin(self, waiting: list[Member], now: float) -> list[Member]:
        """Those of these that the decode instances will have room for."""
        policy = self.policy.back_pressure
        roles = {instance.role for instance in self._instances.values()}
        if policy is None or roles == {Role.MIXED}:
            return waiting
        pooled = {id(member) for member in waiting}
        ahead = [member.row for member in self._members.values() if id(member) not in pooled]
        asking = [Waiting(m.request.arrival, m.request.slo.ttft, m.row) for m in waiting]
        return [waiting[index] for index in policy.admitted(asking, ahead, self._decode_room, now)]

    def _dispatch(self, members: list[Member], views: list[InstanceView]) -> list[Batch]:
        """Make batches of these and send each to one of these instances."""
        if not members:
            return []
        cost = self._price() if self._cost else None
        lengths = [member.request.prompt_tokens + member.generated for member in members]
        groups = []
        for indices in self.policy.batch.batches(lengths, cost):
            longest = max(lengths[index] for index in indices)
            seconds = 0.0 if cost is None else cost.seconds(len(indices), longest)
            groups.append((seconds, [members[index] for index in indices]))
        if self.policy.place.needs_cost:
            groups.sort(key=lambda group: -group[0])
        numbers = [view.number for view in views]
        return [self._send(group, seconds, numbers) for seconds, group in groups]

    def _send(self, members: list[Member], seconds: float, numbers: list[int]) -> Batch:
        tokens = sum(member.request.prompt_tokens + member.generated for member in members)
        first = members[0]
        target = first.bound if first.target is None else first.target
        if target not in numbers:
            views = [self._instances[number].view() for number in numbers]
            target = views[self.policy.place.choose(views, tokens)].number
        instance = self._instances[target]
        sent = Sent(instance.number, seconds, len(members))
        instance.load += seconds
        self._batches += 1
        requests = tuple([self._slice(member, sent, self._batches) for member in members])
        for member in members:
            self._unbind(member)
            instance.members[member.request.id] = member
        return Batch(self._batches, instance.number, requests, seconds)

    def _slice(self, member: Member, sent: Sent, batch: int) -> Request:
        request = member.request
        name = f"{request.id}~{member.stays}" if member.stays else request.id
        while name in self._slices:  # of a request whose own id looks like that
            member.stays += 1
            name = f"{request.id}~{member.stays}"
        member.stays += 1
        self._slices[name] = member
        tokens = self.policy.slice_tokens or request.cap
        if self._instances[sent.instance].role is Role.PREFILL:
            tokens = 1
        return member.begin(name, sent, tokens, batch if self.policy.batch.together else 0)

    def _detach(self, member: Member) -> None:
        """It is at no instance any more; its batch is completed with its last one."""
        sent, name = member.sent, member.slice_id
        assert sent is not None
        assert name is not None
        del self._slices[name]
        member.sent = member.slice_id = None
        instance = self._instances.get(sent.instance)
        if instance is not None:
            del instance.members[member.request.id]
        sent.left -= 1
        if not sent.left and instance is not None:
            # Sums of floats that go back to nothing would leave crumbs.
            instance.load = max(0.0, instance.load - sent.seconds) if instance.members else 0.0

    def _unbind(self, member: Member) -> None:
        if member.bound is not None:
            del self._instances[member.bound].coming[member.request.id]
            member.bound = None

    def _back_to_pool(self, member: Member, now: float) -> None:
        if not member.kv:
            self._unbind(member)
        self._held = False
        if not self._pool:
            self._pooled_at = now
        self._pool[member.request.id] = member
