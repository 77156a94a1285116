"""Stands where one engine process would: takes whole requests, deals in slices behind.

The production :class:`~penstock.core.dispatcher.Dispatcher` decides what goes where.  The front
turns its answers into messages, slices' tokens back into requests' tokens, and keeps what each
request has said so far.  That is what makes the loss of an instance harmless: its requests go on
elsewhere from exactly those tokens that their clients have been sent.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from penstock.cluster.books import NOTHING, Books, joint_gauges, joint_ready
from penstock.cluster.parcels import Packed
from penstock.cluster.prices import slice_cost
from penstock.cluster.stories import InstanceObserver, Instances, Story, seeded
from penstock.core.dispatcher import Batch, Dispatcher, SliceId
from penstock.core.forecast.slices import SliceCost
from penstock.core.policies.dispatch import DispatchPolicy
from penstock.core.types import FinishReason, RequestId, Role
from penstock.server.messages import (
    Add,
    Brought,
    Cancel,
    Command,
    End,
    Event,
    Explain,
    Explained,
    Gauges,
    Missed,
    Ready,
    Refused,
    Step,
    Stop,
)
from penstock.server.supervisor import EngineStartError, Listener

MOST_LOSSES = 4
"""After so many instances died under a request in a row, none of which said a token of it, it ends:
it may be what kills them."""

_EARLY = 0.002
"""Timers count in milliseconds, and may be that much early."""


class Front:
    """A :class:`~penstock.server.supervisor.Backend` of several instances.

    Args:
        policy: who decides on batches, slices and places.
        listener: told what one engine would tell.
        observer: told of each instance.
        roles: of the instances, by number; mixed beyond.
        stream_kv: KV goes to the decode instance chunk by chunk.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        policy: DispatchPolicy,
        listener: Listener,
        observer: InstanceObserver,
        roles: Sequence[Role] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        stream_kv: bool = False,
    ) -> None:
        self._dispatcher = Dispatcher(policy, self._cost)
        self._listener = listener
        self._observer = observer
        self._roles = roles
        self._clock = clock
        self._stream_kv = stream_kv
        # Left by slices whose ends are not known yet.
        self._parcels: dict[SliceId, list[Packed]] = {}
        self._instances: Instances | None = None
        self._books: dict[int, Books] = {}
        self._stories: dict[RequestId, Story] = {}
        self._timer: tuple[float, asyncio.TimerHandle] | None = None
        # Both count from the last time that the listener was told that all is ready.
        self._received = self._evictions = 0

    def attach(self, instances: Instances) -> None:
        """Say through whom to send; before the first instance is ready."""
        self._instances = instances

    @property
    def ready(self) -> bool:
        """Whether an instance is."""
        return bool(self._books)

    async def run(self) -> None:
        """Keep the instances alive until cancelled.

        Raises:
            EngineStartError: they cannot start.
        """
        assert self._instances is not None
        try:
            await self._instances.run()
        finally:
            self._books.clear()
            self._set_timer(math.inf)

    # -- what the client's side says -------------------------------------------------------

    def send(self, command: Command) -> None:
        """Take a command that names whole requests."""
        match command:
            case Add():
                self._received += 1
                self._stories[command.id] = Story(seeded(command))
                self._dispatcher.add(command.request(), self._clock())
            case Cancel():
                self._stories.pop(command.id, None)
                where = self._dispatcher.withdraw(command.id)
                if where is not None:
                    number, slice_id = where
                    self._parcels.pop(slice_id, None)
                    self._to().send(number, Cancel(slice_id, command.reason))
            case Explain():
                self._explain(command)
            case Stop():
                pass  # instances end with run()
        self._arm()

    def _explain(self, command: Explain) -> None:
        story = self._stories.get(command.id)
        if story is not None and story.slice_id:
            self._to().send(story.number, Explain(command.ticket, story.slice_id))
            return
        text = "it has ended"
        if story is not None:
            wait = self._dispatcher.due - self._clock()
            when = f"in {max(0.0, wait):.2f} s" if wait < math.inf else "once an instance is up"
            text = (
                f"in the pool with {self._dispatcher.pooled - 1} others, with "
                f"{len(story.tokens)} output tokens so far; the pool is sent to instances {when}"
            )
        self._listener.on_event(Explained(command.ticket, text))

    # -- what instances say ----------------------------------------------------------------

    def instance_ready(self, number: int, ready: Ready) -> None:
        """An instance takes requests.

        Raises:
            EngineStartError: slices are longer than any request can be.
        """
        most, tokens = ready.max_request_tokens - 1, self._dispatcher.policy.priced_tokens
        if tokens > most:
            msg = (
                f"--parameters.slice_tokens is {tokens}, but no output has more than {most} tokens "
                "here (--max-request-tokens); a longer slice never ends before its request"
            )
            raise EngineStartError(msg)
        role = self._roles[number] if number < len(self._roles) else Role.MIXED
        self._books[number] = Books(ready, role)
        self._dispatcher.join(number, ready.kv_tokens, role)
        self._observer.on_instance(number, NOTHING, 0.0)
        self._tell_ready()
        self._tell()
        self._arm()

    def instance_left(self, number: int, packed: Mapping[SliceId, Sequence[Packed]]) -> None:
        """KV for other instances, before the news of the ends of these slices."""
        if number not in self._books:
            return
        for slice_id, parts in packed.items():
            if self._dispatcher.whole(slice_id) is None:
                continue
            self._parcels.setdefault(slice_id, []).extend(parts)
            for part in parts:
                goes_to = None if part.last else self._dispatcher.bind(slice_id)
                if goes_to is not None:
                    self._to().send_ahead(goes_to, part.parcel)

    def instance_said(self, number: int, event: Event) -> None:
        """An instance has news; what comes from a lost one is dropped."""
        books = self._books.get(number)
        if books is None:
            return
        match event:
            case Step():
                self._on_step(number, books, event)
            case Refused():
                whole = self._dispatcher.whole(event.id)
                if whole is not None:
                    done = self._stories.pop(whole)
                    now, failed = self._clock(), FinishReason.FAILED
                    self._dispatcher.ended(event.id, len(done.tokens), failed, now)
                    self._listener.on_event(Refused(whole, event.field, event.message))
            case Explained():
                self._listener.on_event(event)
            case Brought():
                whole = self._dispatcher.whole(event.id)
                if whole is not None:
                    taken = self._clock() - self._stories[whole].left_at
                    self._observer.on_hand_off(event.bytes, taken)
            case Missed():
                self._on_missed(books, event)
        self._arm()

    def _on_missed(self, books: Books, event: Missed) -> None:
        """A request could not begin without its KV: it goes on from its tokens."""
        books.forget()
        whole = self._dispatcher.whole(event.id)
        if whole is not None:
            self._stories[whole].slice_id = ""
            self._dispatcher.refused(event.id, self._clock())

    def instance_lost(self, number: int) -> None:
        """An instance is gone: what it held goes on elsewhere, from the tokens known here."""
        if self._books.pop(number, None) is None:
            return
        now = self._clock()
        self._tell_progress()
        self._parcels = {s: one for s, one in self._parcels.items() if not self._is_at(s, number)}
        ended = []
        for whole in self._dispatcher.lose(number, now):
            story = self._stories[whole]
            story.slice_id = ""
            story.losses = 0 if len(story.tokens) > story.had else story.losses + 1
            if story.losses >= MOST_LOSSES:
                self._dispatcher.withdraw(whole)
                del self._stories[whole]
                why = f"{story.losses} instances in a row died before they said a token of it"
                reason = FinishReason.FAILED
                ended.append(End(whole, reason, len(story.tokens), story.evictions, why))
        self._observer.on_instance_lost(number, left=len(self._books))
        if self._books:
            self._tell_ready()
        self._tell(ended)
        self._arm()

    def _on_step(self, number: int, books: Books, step: Step) -> None:
        self._evictions += books.take(step.gauges)
        whole_of = self._dispatcher.whole
        tokens: dict[str, int] = {}
        details = {}
        for slice_id, token in step.tokens.items():
            whole = whole_of(slice_id)
            if whole is None:
                continue  # cancelled while the step ran
            tokens[whole] = token
            self._stories[whole].tokens.append(token)
            if slice_id in step.details:
                details[whole] = step.details[slice_id]
        ends = [self._slice_ended(books, end) for end in step.ended]
        ended = [end for end in ends if end is not None]
        self._observer.on_instance(number, step.gauges, self._load_of(number))
        joint = self._gauges()
        told = Step(tokens, details, ended, step.seconds, step.planning, joint, step.swapped)
        self._listener.on_event(told)

    def _slice_ended(self, books: Books, end: End) -> End | None:
        """What the client is told of a slice's end: nothing if the request goes on."""
        whole = self._dispatcher.whole(end.id)
        if whole is None:
            return None
        story = self._stories[whole]
        story.evictions += end.evictions
        if books.role is not Role.PREFILL:
            # Each loss of a decode instance is followed by a prefill, which proves nothing.
            story.losses = 0
        generated, packed = len(story.tokens), self._parcels.pop(end.id, [])
        kv, now = bool(packed) and packed[-1].last, self._clock()
        if self._dispatcher.ended(end.id, generated, end.reason, now, kv=kv) is None:
            story.slice_id = ""
            if kv:
                story.parcels, story.left_at = [part.parcel for part in packed], now
            return None
        del self._stories[whole]
        return End(whole, end.reason, generated, story.evictions, end.detail)

    # -- the pool --------------------------------------------------------------------------

    def _arm(self) -> None:
        """See to it that the pool is looked at when it is due, together with what else comes."""
        self._set_timer(min(self._dispatcher.due, self._dispatcher.move_due))

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            if self._timer[0] == due:
                return
            self._timer[1].cancel()
            self._timer = None
        if due < math.inf:
            delay = max(0.0, due - self._clock())
            handle = asyncio.get_running_loop().call_later(delay, self._dispatch)
            self._timer = (due, handle)

    def _dispatch(self) -> None:
        self._timer = None
        now = self._clock()
        if self._dispatcher.policy.needs_progress:
            self._tell_progress()
        if self._dispatcher.move_due <= now:
            for number, slice_id in self._dispatcher.moves(now):
                # Its end comes back as a slice's does, and it goes on where it is to go.
                self._to().send(number, Cancel(slice_id, FinishReason.CANCELLED))
        if self._dispatcher.due > now + _EARLY:
            self._arm()
            return
        for batch in self._dispatcher.dispatch(now):
            self._send_batch(batch)
        self._arm()

    def _send_batch(self, batch: Batch) -> None:
        books = self._books[batch.instance]
        for request in batch.requests:
            whole = self._dispatcher.whole(request.id)
            assert whole is not None
            story = self._stories[whole]
            story.number, story.slice_id = batch.instance, request.id
            story.had = len(story.tokens)
            books.send(request.prompt_tokens + story.had)
            add = msgspec.structs.replace(
                story.add,
                id=request.id,
                cap=request.cap,
                generated=list(story.tokens),
                batch=request.batch,
                computed=request.computed,
                first_token=request.first_token,
                keep_kv=self._dispatcher.hands_over(request.id),
                stream_kv=self._stream_kv,
            )
            # Whatever becomes of the instance: it had the KV, and nobody else has.
            parcels, story.parcels = story.parcels, ()
            self._to().send(batch.instance, add, parcels if request.computed else ())

    def _to(self) -> Instances:
        assert self._instances is not None
        return self._instances

    def _is_at(self, slice_id: SliceId, number: int) -> bool:
        whole = self._dispatcher.whole(slice_id)
        return whole is not None and self._stories[whole].number == number

    def _tell_progress(self) -> None:
        for story in self._stories.values():
            if story.slice_id:
                self._dispatcher.progress(story.slice_id, len(story.tokens))

    # -- books -----------------------------------------------------------------------------

    def _tell_ready(self) -> None:
        self._received = self._evictions = 0
        self._listener.on_ready(joint_ready(self._books.values()))

    def _tell(self, ended: list[End] | None = None) -> None:
        """Bring the listener's books up to date where no step does."""
        self._listener.on_event(Step({}, {}, ended or [], 0.0, 0.0, self._gauges()))

    def _gauges(self) -> Gauges:
        pooled = self._dispatcher.pooled
        tokens = 0
        if pooled:
            waiting = (story for story in self._stories.values() if not story.slice_id)
            tokens = sum(len(story.add.prompt) + len(story.tokens) for story in waiting)
        return joint_gauges(
            self._books.values(),
            received=self._received,
            pooled=pooled,
            pooled_tokens=tokens,
            evictions=self._evictions,
        )

    def _load_of(self, number: int) -> float:
        return next(view.load for view in self._dispatcher.instances if view.number == number)

    def _cost(self, kv_tokens: int) -> SliceCost:
        policy = self._dispatcher.policy
        said = [books.gauges.prices for books in self._books.values()]
        return slice_cost(
            [prices for prices in said if prices is not None],
            slice_tokens=policy.priced_tokens,
            room=int(kv_tokens * policy.safety),
            most=min(books.ready.max_batch for books in self._books.values()),
            block_size=max(books.ready.block_size for books in self._books.values()),
        )
