"""The engine that is served: tokens without a model, at a model's pace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from penstock.bench.fitted import fitted
from penstock.core.engine import Work
from penstock.core.forecast.latency.affine import Affine
from penstock.core.policies import presets
from penstock.core.runtime import Runtime
from penstock.core.sampling import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.types import Capabilities, Ended, FinishReason, Request
from penstock.sim.clock import VirtualClock
from penstock.sim.run import Job, run
from penstock.sim.served import LENGTHS, ServedEngine
from penstock.sim.sources import OpenLoop
from tests.conformance.engine_kit import CAPABILITIES, check_engine

MODEL = Affine(step=0.01, token=1e-4, work=1e-7, request=1e-3, context=1e-5)
MACHINE = Capabilities(
    kv_blocks=60, block_size=4, max_batch=8, max_step_tokens=64, max_request_tokens=200
)
VOCABULARY, EOS = 64, 3


def engine_of(
    clock: VirtualClock, machine: Capabilities = MACHINE, *, speed: float = 1.0
) -> ServedEngine:
    return ServedEngine(
        machine,
        MODEL,
        vocab_size=VOCABULARY,
        eos_ids=[EOS],
        speed=speed,
        clock=clock,
        sleep=clock.advance,
    )


def runtime_of(clock: VirtualClock, machine: Capabilities = MACHINE, **more: float) -> Runtime:
    scheduler = Scheduler(machine, presets.build("vllm"))
    return Runtime(scheduler, engine_of(clock, machine, **more), clock)


def outputs(runtime: Runtime) -> tuple[dict[str, list[int]], dict[str, Ended]]:
    """Turn until idle; what each request said, and its end."""
    said: dict[str, list[int]] = {}
    ended: dict[str, Ended] = {}
    while (step := runtime.step()) is not None:
        for name, token in step.tokens.items():
            said.setdefault(name, []).append(token.id)
        ended |= {end.id: end for end in step.ended}
    return said, ended


def test_it_is_an_engine_like_the_others() -> None:
    check_engine(lambda capabilities: engine_of(VirtualClock(), capabilities))
    assert CAPABILITIES.prefix_cache


def test_depth_and_speed_are_checked() -> None:
    with pytest.raises(ValueError, match="depth is 2"):
        engine_of(VirtualClock(), replace(MACHINE, depth=2))
    with pytest.raises(ValueError, match="speed is 0"):
        engine_of(VirtualClock(), speed=0)


@pytest.mark.parametrize("speed", [1.0, 8.0])
def test_requests_end_when_the_simulator_says(speed: float) -> None:
    """Evictions, chunks and idle times included: 240 KV tokens for up to 8 x 70."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.05, 40))
    arrivals[20:] += 60  # it falls idle in between
    jobs = [
        Job(str(i), float(arrivals[i]), int(rng.integers(1, 50)), int(rng.integers(1, 40)), 60)
        for i in range(40)
    ]
    done = run(OpenLoop(jobs), MACHINE, presets.build("vllm"), MODEL)
    assert done.evictions > 5

    clock = VirtualClock()
    runtime = runtime_of(clock, speed=speed)
    left, ends = list(jobs), dict[str, float]()
    while len(ends) < len(jobs):
        while left and left[0].arrival / speed <= clock.now * (1 + 1e-12):
            job = left.pop(0)
            work = Work([1] * job.prompt, trace_length=job.output)
            runtime.add(Request(job.id, job.prompt, job.cap, clock.now), work)
        step = runtime.step()
        if step is None:
            clock.advance_to(left[0].arrival / speed)
            continue
        ends |= {end.id: clock.now for end in step.ended}
    assert ends == pytest.approx(
        {record.job.id: record.at / speed for record in done.records}, rel=1e-9
    )


def test_the_hosts_own_time_is_part_of_the_next_step_but_is_not_hurried_after() -> None:
    clock = VirtualClock()
    runtime = runtime_of(clock)
    runtime.add(Request("a", 10, 60, 0.0), Work([1] * 10, trace_length=50))
    runtime.step()
    times = []
    for host in (0.0, 0.004, 0.0, 5.0, 0.0):
        began = clock.now
        clock.advance(host)
        runtime.step()
        times.append(clock.now - began)
    model = 0.01 + 1e-3 + 1e-5 * 13
    assert times == pytest.approx([model, model, model, 5.0, model], abs=1e-4)


def test_untold_lengths_are_those_of_the_fit_and_end_with_the_end_token() -> None:
    clock = VirtualClock()
    machine = replace(MACHINE, kv_blocks=1 << 20, max_batch=4000, max_step_tokens=1 << 20,
                      max_request_tokens=1 << 20)  # fmt: skip
    runtime = runtime_of(clock, machine)
    for i in range(2000):
        greedy = SamplingParams(temperature=0.0)
        runtime.add(Request(f"{i}", 2, 5000, 0.0), Work([i // 64, i % 64], greedy))
    said, ended = outputs(runtime)
    assert all(text[-1] == EOS and EOS not in text[:-1] for text in said.values())
    assert {end.reason for end in ended.values()} == {FinishReason.STOP}
    lengths = fitted(LENGTHS, 4096, seed=1).output
    assert lengths is not None
    for share in (0.25, 0.5, 0.75, 0.95):
        mine = np.quantile([len(text) for text in said.values()], share)
        assert mine == pytest.approx(np.quantile(lengths, share), rel=0.1)


def test_the_same_request_gets_the_same_answer_and_another_seed_another() -> None:
    def texts() -> dict[str, list[int]]:
        runtime = runtime_of(VirtualClock())
        for name, seed in (("a", None), ("b", None), ("c", 7), ("d", 8)):
            runtime.add(Request(name, 3, 20, 0.0), Work([5, 6, 7], SamplingParams(seed=seed)))
        return outputs(runtime)[0]

    first = texts()
    assert first == texts()
    assert first["a"] == first["b"]
    assert len({tuple(first[name]) for name in "acd"}) == 3


def test_stop_tokens_caps_and_ignored_ends() -> None:
    def one(cap: int, sampling: SamplingParams) -> tuple[list[int], FinishReason]:
        runtime = runtime_of(VirtualClock())
        runtime.add(Request("a", 3, cap, 0.0), Work([5, 6, 7], sampling))
        said, ended = outputs(runtime)
        return said["a"], ended["a"].reason

    endless, reason = one(190, SamplingParams(ignore_eos=True))
    assert (len(endless), reason) == (190, FinishReason.LENGTH)
    assert EOS not in endless
    stop = endless[4]
    stopped, reason = one(190, SamplingParams(stop_token_ids=(stop,)))
    assert reason is FinishReason.STOP
    assert stopped == endless[: endless.index(stop) + 1]
    cut, reason = one(2, SamplingParams())
    assert (cut, reason) == (endless[:2], FinishReason.LENGTH)
