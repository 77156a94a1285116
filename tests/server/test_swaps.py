"""KV that goes to host memory and comes back is counted, from the plan to the metrics."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from penstock.core.engine import Ticket, Work
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Drop, FinishReason, Request, Start, StepPlan
from penstock.server.engine_loop import EngineLoop
from penstock.server.messages import Add, Cancel, Event, Step
from penstock.server.metrics import Metrics
from penstock.server.swaps import SwapCounter
from penstock.testing import ScriptedEngine
from tests.cluster.fakes import HandPipe
from tests.server.harness import Server, wait_until

TIGHT = Capabilities(16, 4, 8, 32, 60, swap_tokens=40)


class Instance:
    """An engine loop that does something when it is turned, and its metrics."""

    def __init__(self) -> None:
        self.pipe = HandPipe()
        self.engine = ScriptedEngine(TIGHT)
        self.counter = SwapCounter(self.engine)
        scheduler = Scheduler(TIGHT, presets.build("vllm"))
        self.books = scheduler._books
        runtime = Runtime(scheduler, self.counter, time.monotonic)
        self.loop = EngineLoop(runtime, self.pipe, swaps=self.counter)
        self.metrics = Metrics("demo")

    def ask(self, name: str) -> None:
        work = Work([1, 2, 3], trace_length=40)
        self.pipe.commands.append(Add.pack(Request(name, 3, 50, time.monotonic()), work))

    def turn(self) -> bool:
        worked = self.loop.turn()
        while self.pipe.events:
            event: Event = self.pipe.events.popleft()
            if isinstance(event, Step):
                self.metrics.on_step(event)
        return worked

    def metric(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"penstock:{name}", {"model_name": "demo"})
        assert value is not None
        return value


def swapping() -> Instance:
    """An instance that has just taken KV to host memory."""
    one = Instance()
    for name in "abcd":
        one.ask(name)
    while not one.metric("kv_host_tokens"):
        assert one.turn()
    return one


def test_all_that_goes_out_comes_back() -> None:
    one = Instance()
    for name in "abcd":
        one.ask(name)
    most = 0.0
    while one.turn():
        assert one.metric("kv_host_tokens") == one.books.swapped
        most = max(most, one.metric("kv_host_tokens"))
    assert 0 < most <= TIGHT.swap_tokens
    assert one.metric("kv_swapped_out_tokens_total") == one.engine.swapped > 0
    assert one.metric("kv_swapped_in_tokens_total") == one.engine.swapped
    assert one.metric("kv_host_tokens") == 0


class Taker:
    """Takes plans and does nothing."""

    capabilities = TIGHT

    def submit(self, plan: StepPlan) -> Ticket:
        return Ticket(plan.number)


def test_what_cached_blocks_hold_is_not_copied_back() -> None:
    counter = SwapCounter(Taker())
    counter.submit(StepPlan(1, (Drop("a", final=False, swapped=12),), (), (), (), ()))
    assert (counter.take(), counter.held) == ((12, 0), 12)
    counter.submit(StepPlan(2, (), (), (Start("a", 13, (b"x", b"y"), 12),), (), ()))
    assert (counter.take(), counter.held) == ((0, 4), 0)


def test_what_ends_in_host_memory_does_not_come_back() -> None:
    one = swapping()
    held = one.metric("kv_host_tokens")
    for name, entry in list(one.books.entries.items()):
        if entry.swapped:
            one.pipe.commands.append(Cancel(name, FinishReason.CANCELLED))
    assert one.turn()
    assert one.metric("kv_host_tokens") == 0
    assert one.metric("kv_swapped_out_tokens_total") == held
    assert one.metric("kv_swapped_in_tokens_total") == 0


def test_a_lost_engine_holds_nothing() -> None:
    one = swapping()
    one.metrics.on_death()
    assert one.metric("kv_host_tokens") == 0


def test_a_server_says_what_it_swaps() -> None:
    flags = ("--trace-lengths", "--preset", "vllm", "--kv-tokens", "1024", "--no-prefix-cache")
    with Server(*flags, "--swap-tokens", "2048") as server:

        def one(number: int) -> None:
            with server.client() as client:
                client.completions.create(
                    model="demo",
                    prompt=[300 + number] * 60,
                    max_tokens=400,
                    extra_body={"trace_output_tokens": 300},
                )

        assert server.metric("kv_swapped_out_tokens_total") == 0
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(8)))
        wait_until(lambda: server.metric("kv_host_tokens") == 0)
        out = server.metric("kv_swapped_out_tokens_total")
        assert out == server.metric("kv_swapped_in_tokens_total") > 0
