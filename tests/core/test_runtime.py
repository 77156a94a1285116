"""The loop: what is delivered, what is not, and what an engine is told."""

from __future__ import annotations

import pytest

from penstock.core.engine import Ticket, Work
from penstock.core.policies import presets
from penstock.core.runtime import Runtime, StepOutput
from penstock.core.scheduler import Scheduler
from penstock.core.types import (
    SLO,
    Capabilities,
    FinishReason,
    OnMiss,
    Request,
    RequestError,
    StepPlan,
    StepResult,
)
from penstock.testing import ScriptedEngine
from penstock.testing.scripted import ScriptedKV
from tests.core.drive import Clock, capabilities


class Failing(ScriptedEngine):
    """Gives up the requests named in ``fail``, in the next step."""

    def __init__(self, machine: Capabilities) -> None:
        super().__init__(machine)
        self.fail: set[str] = set()

    def collect(self, ticket: Ticket) -> StepResult:
        result = super().collect(ticket)
        failed = dict.fromkeys(self.fail & result.tokens.keys(), "out of luck")
        self.fail -= failed.keys()
        tokens = {name: token for name, token in result.tokens.items() if name not in failed}
        return StepResult(result.number, result.seconds, tokens, result.stopped, failed)


class Turned:
    """A runtime with a scripted engine, and everything it delivered."""

    def __init__(self, machine: Capabilities, preset: str = "vllm") -> None:
        self.clock = Clock()
        self.engine = Failing(machine)
        self.runtime = Runtime(Scheduler(machine, presets.build(preset)), self.engine, self.clock)
        self.texts: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.counts: dict[str, int] = {}

    def add(
        self, name: str, prompt: int, cap: int, length: int, *, hands_over: bool = False,
        **slo: float,
    ) -> Work:  # fmt: skip
        work = Work(
            tuple(range(prompt)), trace_length=length, keep_kv=hands_over, stream_kv=hands_over
        )
        on_miss = OnMiss.EXPIRE if slo else OnMiss.KEEP
        request = Request(name, prompt, cap, self.clock.now, slo=SLO(**slo), on_miss=on_miss)
        self.runtime.add(request, work)
        return work

    def step(self) -> StepOutput | None:
        output = self.runtime.step()
        if output is not None:
            self.clock.now += output.seconds
            for name, token in output.tokens.items():
                assert name not in self.reasons, "a token after the end"
                self.texts.setdefault(name, []).append(token.id)
            for ended in output.ended:
                assert ended.id not in self.reasons, "ended twice"
                self.reasons[ended.id] = ended.reason
                self.counts[ended.id] = ended.output_tokens
        return output

    def finish(self) -> None:
        for _ in range(1000):
            if self.step() is None:
                break
        assert self.engine.open_requests == 0
        assert self.engine.used_blocks == 0
        assert self.counts == {name: len(self.texts.get(name, [])) for name in self.reasons}


DEPTHS = pytest.mark.parametrize("depth", [1, 2, 3])


@DEPTHS
def test_texts_come_whole_and_the_last_token_with_the_end(depth: int) -> None:
    turned = Turned(capabilities(depth=depth))
    work = turned.add("a", 5, 20, 7)
    for _ in range(20):
        output = turned.step()
        assert output is not None
        if output.ended:
            assert list(output.tokens) == ["a"]
            break
    turned.finish()
    assert turned.texts["a"] == turned.engine.expected_text(work, 20)
    assert turned.reasons == {"a": FinishReason.STOP}


@DEPTHS
def test_nothing_to_do(depth: int) -> None:
    turned = Turned(capabilities(depth=depth))
    assert turned.step() is None
    turned.add("a", 5, 20, 7)
    turned.finish()
    assert turned.step() is None


@DEPTHS
def test_as_many_plans_are_in_flight_as_the_engine_can_take(depth: int) -> None:
    turned = Turned(capabilities(depth=depth))
    turned.add("a", 5, 20, 20)
    turned.step()
    assert turned.runtime.stats().plans == depth


@DEPTHS
def test_no_token_is_delivered_after_a_cancellation(depth: int) -> None:
    turned = Turned(capabilities(depth=depth))
    turned.add("a", 5, 50, 40)
    turned.add("b", 5, 50, 20)
    for _ in range(6):
        turned.step()
    assert turned.runtime.cancel("a")
    had = len(turned.texts["a"])
    turned.finish()
    assert len(turned.texts["a"]) == had
    assert turned.reasons == {"a": FinishReason.CANCELLED, "b": FinishReason.STOP}
    assert not turned.runtime.cancel("a")


@DEPTHS
def test_a_waiting_request_that_is_cancelled_is_discarded_from_the_engine(depth: int) -> None:
    turned = Turned(capabilities(max_batch=1, depth=depth))
    turned.add("a", 5, 50, 10)
    turned.add("b", 5, 50, 10)
    turned.step()
    assert turned.engine.open_requests == 2
    turned.runtime.cancel("b")
    turned.step()
    assert turned.engine.open_requests == 1
    turned.finish()


def test_a_cancellation_is_told_even_if_nothing_runs() -> None:
    turned = Turned(capabilities())
    turned.add("a", 5, 50, 10)
    turned.runtime.cancel("a", FinishReason.FAILED)
    output = turned.step()
    assert output is not None
    assert (output.tokens, output.seconds) == ({}, 0.0)
    assert [(end.id, end.reason) for end in output.ended] == [("a", FinishReason.FAILED)]
    assert turned.engine.open_requests == 0
    assert turned.step() is None


@DEPTHS
def test_an_expired_waiting_request_is_discarded_from_the_engine(depth: int) -> None:
    turned = Turned(capabilities(max_batch=1, depth=depth))
    turned.add("a", 5, 50, 30)
    turned.add("b", 5, 50, 10, ttft=0.005)
    turned.finish()
    assert turned.reasons == {"a": FinishReason.STOP, "b": FinishReason.EXPIRED}


@DEPTHS
def test_a_request_that_fails_ends_alone(depth: int) -> None:
    turned = Turned(capabilities(depth=depth))
    turned.add("a", 5, 50, 30)
    work = turned.add("b", 5, 50, 10)
    for _ in range(3):
        turned.step()
    turned.engine.fail.add("a")
    turned.finish()
    assert turned.reasons == {"a": FinishReason.FAILED, "b": FinishReason.STOP}
    assert turned.texts["b"] == turned.engine.expected_text(work, 50)


def test_what_cannot_be_served_leaves_nothing_behind() -> None:
    turned = Turned(capabilities())
    with pytest.raises(RequestError, match="at most 200 are allowed"):
        turned.add("long", 150, 90, 5)
    with pytest.raises(RequestError, match="token id 300 is not in"):
        turned.runtime.add(Request("odd", 1, 5, 0.0), Work((300,)))
    with pytest.raises(ValueError, match="prompt_tokens is 2 but the prompt has 3 tokens"):
        turned.runtime.add(Request("short", 2, 5, 0.0), Work((1, 2, 3)))
    assert turned.engine.open_requests == 0
    assert turned.step() is None
    for name in ("long", "odd", "short"):
        turned.add(name, 5, 5, 5)
    with pytest.raises(RequestError, match="request id 'odd' is in use"):
        turned.add("odd", 5, 5, 5)
    turned.finish()
    assert set(turned.reasons.values()) == {FinishReason.STOP}


def test_the_time_of_planning_is_measured_on_the_given_clock() -> None:
    class Slow(Scheduler):
        """Takes a quarter of a second to plan."""

        def plan(self, now: float) -> StepPlan | None:
            clock.now += 0.25
            return super().plan(now)

    clock = Clock()
    machine = capabilities(depth=2)
    runtime = Runtime(Slow(machine, presets.build("vllm")), ScriptedEngine(machine), clock)
    runtime.add(Request("a", 5, 9, 0.0), Work(tuple(range(5)), trace_length=9))
    first, second = runtime.step(), runtime.step()
    assert first is not None
    assert second is not None
    assert (first.planning, second.planning) == (0.5, 0.25)


@DEPTHS
@pytest.mark.parametrize("others", [0, 3])
def test_kv_goes_ahead_chunk_by_chunk(depth: int, others: int) -> None:
    """And once only, also if its owner is evicted and computes it again."""
    machine = capabilities(depth=depth, kv_blocks=20, block_size=4, max_batch=8, max_step_tokens=10)
    turned = Turned(machine)
    for number in range(others):
        turned.add(f"other-{number}", 3, 70, 26)
    work = turned.add("goes", 50, 6, 20, hands_over=True)
    parts, sizes, evictions = [], [], 0
    for _ in range(300):
        output = turned.step()
        if output is None:
            break
        for name, part in output.parts.items():
            assert name == "goes"
            assert isinstance(part, ScriptedKV)
            parts.append(part)
            sizes.append(part.tokens)
        if "goes" in output.kept:
            rest = output.kept["goes"]
            assert isinstance(rest, ScriptedKV)
            parts.append(rest)
        evictions += sum(ended.evictions for ended in output.ended if ended.id == "goes")
    turned.finish()
    assert turned.reasons["goes"] is FinishReason.LENGTH
    text = turned.texts["goes"]
    assert list(ScriptedKV.join(parts).held) == [*work.prompt, *text[:-1]]
    assert sum(sizes) >= 50
    assert max(sizes) <= 10
    assert (evictions > 0) == (others > 0)
