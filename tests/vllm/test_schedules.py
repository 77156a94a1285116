"""Penstock's schedules carried out by vLLM's scheduler classes, on workers without a model."""

from __future__ import annotations

import random
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm.config import LoRAConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason

from penstock.core.policies import presets
from penstock.vllm import adapters
from penstock.vllm.verdict import Verdict
from tests.vllm.engine import BLOCK, Loop, text_of

ONLINE = sorted(set(presets.PRESETS) - {"oracle"})


def preset(name: str, **parameters: float) -> dict[str, Any]:
    return {"scheduler": {"preset": name, "parameters": parameters}}


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    head = [rng.randrange(3, 4000) for _ in range(shared)]
    return [
        head + [rng.randrange(3, 4000) for _ in range(rng.randrange(1, 40))] for _ in range(count)
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ONLINE)
def test_texts_are_the_models_under_every_preset(name: str, *, asynchronous: bool) -> None:
    loop = Loop(preset(name), blocks=40, asynchronous=asynchronous)
    made = prompts(30, shared=9)
    for i, prompt in enumerate(made):
        loop.add(f"r{i}", prompt, 1 + i)
    loop.run()
    for i, prompt in enumerate(made):
        assert loop.texts[f"r{i}"] == text_of(prompt, 1 + i)
        assert loop.ends[f"r{i}"].finish_reason is FinishReason.LENGTH
    assert loop.worker.most_tokens <= 32


load = st.lists(
    st.tuples(
        st.integers(0, 60),  # steps before it comes
        st.integers(1, 30),  # prompt tokens of its own
        st.integers(0, 2),  # which shared beginning
        st.integers(1, 40),  # most tokens
        st.one_of(st.none(), st.integers(1, 60)),  # steps until its client leaves
    ),
    min_size=1,
    max_size=24,
)


@given(
    load,
    st.sampled_from(["past-future", "vllm", "kairos", "tgi", "sls"]),
    st.booleans(),
    st.booleans(),
    st.integers(26, 80),
)
@settings(max_examples=150)
def test_whatever_comes_texts_are_right_and_nothing_is_lost(
    load: list[Any], name: str, asynchronous: bool, caching: bool, blocks: int
) -> None:
    loop = Loop(
        preset(name), blocks=blocks, asynchronous=asynchronous, caching=caching, max_model_len=96
    )
    heads = [[], list(range(100, 111)), list(range(100, 109))]
    coming = sorted(
        (at, f"r{i}", heads[head] + [500 + i * 40 + k for k in range(own)], most, stays)
        for i, (at, own, head, most, stays) in enumerate(load)
    )
    leaving: list[tuple[int, str]] = []
    made = {name: (prompt, most) for _, name, prompt, most, _ in coming}
    for step in range(4000):
        while coming and coming[0][0] <= step:
            _, request, prompt, most, stays = coming.pop(0)
            loop.add(request, prompt, most)
            if stays is not None:
                leaving.append((step + stays, request))
        for at, request in [one for one in leaving if one[0] <= step]:
            loop.abort(request)
            leaving.remove((at, request))
        if not loop.step() and not coming:
            break
    loop.check_idle()
    left = {request for request in made if request not in loop.ends}
    assert left <= {f"r{i}" for i, one in enumerate(load) if one[4] is not None}
    for request, (prompt, most) in made.items():
        text = loop.texts[request]
        assert text == text_of(prompt, most)[: len(text)]
        assert request in left or len(text) == most


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 4), st.integers(1, 20), st.integers(1, 30)),
        min_size=1,
        max_size=24,
    ),
    st.integers(1, 3),
    st.sampled_from(["past-future", "vllm", "kairos", "tgi", "sls"]),
    st.booleans(),
)
@settings(max_examples=60)
def test_no_step_needs_more_lora_adapters_than_have_a_place(
    load: list[Any], most: int, name: str, asynchronous: bool
) -> None:
    loop = Loop(
        preset(name), blocks=30, asynchronous=asynchronous, max_model_len=96,
        lora_config=LoRAConfig(max_loras=most, max_lora_rank=8, max_cpu_loras=4),
    )  # fmt: skip
    coming = sorted((at, i, *rest) for i, (at, *rest) in enumerate(load))
    made = {f"r{i}": rest for _, i, *rest in coming}
    for step in range(4000):
        while coming and coming[0][0] <= step:
            _, i, adapter, own, tokens = coming.pop(0)
            # The same prompt with another adapter shares nothing.
            loop.add(f"r{i}", list(range(9, 9 + own)), tokens, adapter=adapter)
        if not loop.step() and not coming:
            break
    loop.check_idle()
    assert loop.worker.most_adapters <= most
    for request, (adapter, own, tokens) in made.items():
        assert loop.texts[request] == text_of(list(range(9, 9 + own)), tokens, adapter)


def test_who_waits_for_an_adapters_place_holds_nobody_up_until_it_has_waited_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for patience, first in ((1000.0, "behind"), (0.0, "third")):
        monkeypatch.setattr(adapters, "PATIENCE", patience)
        loop = Loop(
            preset("vllm"), lora_config=LoRAConfig(max_loras=2, max_lora_rank=8, max_cpu_loras=3)
        )
        loop.add("one", [5, 6, 7], 10, adapter=1)
        loop.add("two", [5, 6, 8], 20, adapter=2)
        loop.step()
        loop.add("third", [5, 6, 9], 9, adapter=3)
        loop.add("behind", [5, 6, 10], 3, adapter=1)
        loop.step()
        loop.step()
        (told,) = loop.scheduler.explain("third")
        assert told["explanation"] == "waiting: its LoRA adapter has no place: 2 are in use"
        loop.run()
        ends = [name for name in loop.ends if name in {"third", "behind"}]
        assert ends[0] == first
        assert loop.worker.most_adapters == 2


def test_evictions_are_vllms_preemptions() -> None:
    loop = Loop(preset("vllm"), blocks=24)
    requests = [loop.add(f"r{i}", [10 + i, 11, 12], 60) for i in range(6)]
    loop.run()
    assert loop.scheduler.core.evictions > 0
    assert sum(one.num_preemptions for one in requests) == loop.scheduler.core.evictions
    assert all(loop.texts[f"r{i}"] == text_of([10 + i, 11, 12], 60) for i in range(6))


def test_who_starts_again_in_the_plan_that_evicted_it_is_told_whole() -> None:
    loop = Loop(preset("vllm"), blocks=30, asynchronous=False, max_model_len=96)
    for name, prompt, most in (("a", 1, 21), ("b", 1, 21), ("c", 13, 21)):
        loop.add(name, list(range(9, 9 + prompt)), most)
    for _ in range(19):
        loop.step()
    for name, prompt in (("d", 12), ("e", 16)):
        loop.add(name, list(range(209, 209 + prompt)), 2)
    loop.run()
    assert loop.texts["e"] == text_of(list(range(209, 225)), 2)


def test_reserving_evicts_nobody_where_the_watermark_does() -> None:
    evictions = {}
    for name in ("vllm", "tgi"):
        loop = Loop(preset(name), blocks=24)
        for i in range(6):
            loop.add(f"r{i}", [10 + i, 11, 12], 60)
        loop.run()
        evictions[name] = loop.scheduler.core.evictions
    assert evictions["vllm"] > 0
    assert evictions["tgi"] == 0


def test_a_shared_beginning_is_computed_once() -> None:
    head = list(range(50, 50 + 5 * BLOCK))
    loop = Loop()
    loop.add("first", [*head, 1000], 4)
    loop.run()
    second = loop.add("second", [*head, 1001], 4)
    loop.step()
    assert second.num_computed_tokens >= 5 * BLOCK
    loop.run()
    stats = loop.scheduler.make_stats()
    assert stats is not None
    assert loop.texts["second"] == text_of([*head, 1001], 4)
    assert second.num_tokens == len(head) + 5


def test_what_was_generated_may_be_shared_as_well() -> None:
    prompt = [70, 71, 72]
    loop = Loop()
    # It ends by itself: at a stop token that its text has.
    text = text_of(prompt, 12)
    loop.add("first", prompt, 40, stop_token_ids=[text[-1]])
    loop.run()
    assert loop.ends["first"].finish_reason is FinishReason.STOP
    assert loop.ends["first"].stop_reason == text[-1]
    again = loop.add("second", prompt + text, 4)
    loop.step()
    assert again.num_computed_tokens >= (len(prompt) + 11) // BLOCK * BLOCK
    loop.run()
    assert loop.texts["second"] == text_of(prompt + text, 4)


def test_the_last_token_has_no_kv_to_share() -> None:
    prompt = [70, 71, 72]
    text = text_of(prompt, 2 * BLOCK - 3)
    loop = Loop(asynchronous=False)
    loop.add("first", prompt, 40, stop_token_ids=[text[-1]])
    loop.run()
    assert loop.texts["first"] == text
    loop.add("second", [*prompt, *text, 9], 4)
    loop.run()
    assert loop.texts["second"] == text_of([*prompt, *text, 9], 4)


def test_measured_seconds_reach_the_policies() -> None:
    loop = Loop(preset("kairos"))
    results: list[float] = []
    confirm = loop.scheduler.core.confirm
    loop.scheduler.core.confirm = lambda result: (results.append(result.seconds), confirm(result))
    began = time.monotonic()
    loop.add("a", [5, 6, 7], 20)
    loop.run()
    assert all(seconds > 0 for seconds in results)
    assert len(results) > 20
    assert sum(results) <= time.monotonic() - began  # overlapping steps are not counted twice


def test_the_prefix_cache_can_be_reset_while_nobody_holds_it() -> None:
    loop = Loop()
    loop.add("a", list(range(40, 60)), 4)
    loop.step()
    assert not loop.scheduler.reset_prefix_cache()
    loop.run()
    assert loop.scheduler.core.stats(0.0).kv_idle > 0
    assert loop.scheduler.reset_prefix_cache()
    again = loop.add("b", list(range(40, 60)), 4)
    loop.step()
    assert loop.scheduler.make_stats().prefix_cache_stats.hits == 0
    loop.run()
    assert again.num_output_tokens == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reset_in_a_pause_computes_everything_again(*, asynchronous: bool) -> None:
    loop = Loop(asynchronous=asynchronous)
    loop.add("a", list(range(40, 60)), 30)
    for _ in range(9):
        loop.step()
    with pytest.raises(RuntimeError, match="in mid-step") if asynchronous else nullcontext():
        loop.scheduler.reset_prefix_cache(reset_running_requests=True)
    loop.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    while loop.step():  # what is in flight is brought home
        pass
    assert loop.scheduler.reset_prefix_cache(reset_running_requests=True)
    loop.worker.memory.clear()  # as new weights would
    loop.scheduler.set_pause_state(PauseState.UNPAUSED)
    loop.run()
    assert loop.texts["a"] == text_of(list(range(40, 60)), 30)
    assert loop.scheduler.reset_prefix_cache(reset_running_requests=True)


def test_what_a_capped_answer_said_may_be_shared_as_well() -> None:
    prompt = [70, 71, 72]
    text = text_of(prompt, 12)
    loop = Loop()
    loop.add("first", prompt, 12)
    loop.run()
    again = loop.add("second", prompt + text, 4)
    loop.step()
    assert again.num_computed_tokens >= (len(prompt) + 11) // BLOCK * BLOCK
    loop.run()
    assert loop.texts["second"] == text_of(prompt + text, 4)


def test_who_understands_a_verdict_is_told_by_an_abort_all_else_by_an_error() -> None:
    loop = Loop({"slo": {"strict": {"ttft": 0.000_01, "on_miss": "expire"}}})
    told = {"slo_class": "strict", "penstock_answer": "x"}
    delta = RequestOutputKind.DELTA
    loop.add("stream", [5, 6, 7], 8, extra_args=told, output_kind=delta, logprobs=2)
    loop.add("offline", [5, 6, 7], 8, extra_args={"slo_class": "strict"})
    loop.run()
    assert loop.ends["stream"].finish_reason is FinishReason.ABORT
    assert loop.ends["offline"].finish_reason is FinishReason.ERROR
    assert loop.texts == {"stream": [], "offline": []}


def test_where_a_request_stands_can_be_asked_at_any_time() -> None:
    loop = Loop({"scheduler": {"preset": "vllm"}}, max_num_seqs=1, asynchronous=False)
    loop.add("cmpl-first-0-0123abcd", [5, 6, 7], 8)
    loop.add("cmpl-next-0-0123abcd", [5, 6, 7, 8], 8)
    loop.step()
    (first,) = loop.scheduler.explain("cmpl-first")
    assert (first["index"], first["prompt_tokens"], first["output_tokens"]) == (0, 3, 1)
    assert str(first["explanation"]).startswith("decode: 1 of at most 8")
    (then,) = loop.scheduler.explain("cmpl-next")
    assert str(then["explanation"]).startswith("waiting: ")
    assert loop.scheduler.explain("cmpl") == []
    loop.run()
    assert loop.scheduler.explain("cmpl-first") == []


def test_explaining_from_another_thread_disturbs_nobody() -> None:
    loop = Loop(blocks=40)
    made = prompts(40, shared=9)
    for i, prompt in enumerate(made):
        loop.add(f"r{i}", prompt, 20)
    told: list[object] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            told.extend(one["explanation"] for i in range(40) for one in explain(f"r{i}"))

    explain = loop.scheduler.explain
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        loop.run()
    finally:
        over.set()
        asking.join()
    assert any("waiting" in str(one) for one in told)
    assert all(loop.texts[f"r{i}"] == text_of(prompt, 20) for i, prompt in enumerate(made))


def test_parts_of_a_refused_answer_are_not_generated_for_nobody() -> None:
    loop = Loop({"admission": {"max_waiting": 3}})
    for i in range(6):
        loop.add(f"r{i}", [5, 6, 7], 8, extra_args={"penstock_answer": "one"})
    loop.add("other", [5, 6, 9], 8)
    loop.run()
    assert all(loop.texts[f"r{i}"] == [] for i in range(6))
    assert {loop.ends[f"r{i}"].stop_reason for i in range(6)} == {loop.ends["r3"].stop_reason}
    assert loop.texts["other"] == text_of([5, 6, 9], 8)
    assert loop.worker.steps <= 10


def test_what_the_plug_in_did_not_think_of_ends_one_request_only() -> None:
    loop = Loop()
    loop.scheduler.core.validate = lambda _: 1 / 0
    loop.add("a", [5, 6], 3)
    del loop.scheduler.core.validate
    loop.add("b", [5, 6], 3)
    loop.run()
    assert loop.ends["a"].finish_reason is FinishReason.ERROR
    assert loop.texts["b"] == text_of([5, 6], 3)


def test_prompt_logprobs_compute_everything() -> None:
    prompt = list(range(40, 60))
    loop = Loop()
    loop.add("a", prompt, 4)
    loop.run()
    whole = loop.add("b", prompt, 4, prompt_logprobs=1)
    loop.step()
    assert whole.num_computed_tokens == len(prompt)
    stats = loop.scheduler.make_stats().prefix_cache_stats  # of this step alone
    assert (stats.queries, stats.hits) == (0, 0)
    loop.run()


def test_an_expired_promise_is_told_as_such_and_costs_nobody_else() -> None:
    loop = Loop({"slo": {"strict": {"ttft": 0.000_01, "on_miss": "expire"}}})
    loop.add("late", [5, 6, 7], 8, extra_args={"slo_class": "strict"})
    loop.add("fine", [5, 6, 8], 8)
    loop.run()
    end = loop.ends["late"]
    assert end.finish_reason is FinishReason.ERROR
    verdict = Verdict.decode(end.stop_reason)
    assert verdict is not None
    assert verdict.kind == "expired"
    assert verdict.error().status == 504
    assert loop.texts["fine"] == text_of([5, 6, 8], 8)


def test_a_promise_missed_in_mid_answer_ends_it_there() -> None:
    loop = Loop()
    loop.add("late", [5, 6, 7], 100, extra_args={"slo_e2e_ms": 1.0})
    loop.run()
    assert loop.ends["late"].finish_reason is FinishReason.LENGTH  # on_miss is keep
    loop = Loop({"slo": {"short": {"e2e": 0.001, "on_miss": "expire"}}})
    loop.add("late", [5, 6, 7], 100, extra_args={"slo_class": "short"})
    loop.run()
    verdict = Verdict.decode(loop.ends["late"].stop_reason)
    assert verdict is not None
    assert verdict.kind == "expired"
    assert len(loop.texts["late"]) < 100


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    loop = Loop({"admission": {"max_waiting": 3}})
    for i in range(6):
        loop.add(f"r{i}", [5, 6, 7], 8)
    loop.run()
    refused = [name for name, end in loop.ends.items() if end.finish_reason is FinishReason.ERROR]
    assert refused == ["r3", "r4", "r5"]
    verdict = Verdict.decode(loop.ends["r5"].stop_reason)
    assert verdict is not None
    assert (verdict.kind, verdict.limit) == ("refused", "max_waiting")
    assert verdict.retry_after >= 1
    assert verdict.error().status == 429


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"slo_class": "nobody"}, "vllm_xargs.slo_class"),
        ({"slo_ttft_ms": "soon"}, "vllm_xargs.slo_ttft_ms"),
        ({"slo_gap_ms": -1}, "vllm_xargs.slo_gap_ms"),
    ],
)
def test_a_wrong_promise_is_refused_by_name(extra: dict[str, object], param: str) -> None:
    loop = Loop()
    loop.add("wrong", [5, 6, 7], 8, extra_args=extra)
    loop.run()
    verdict = Verdict.decode(loop.ends["wrong"].stop_reason)
    assert verdict is not None
    assert (verdict.kind, verdict.param) == ("invalid", param)
    assert verdict.error().status == 400


def test_a_prompt_without_room_for_an_answer_is_refused() -> None:
    loop = Loop()
    loop.add("long", list(range(3, 131)), 8)
    loop.add("fine", [5, 6], 2)
    loop.run()
    verdict = Verdict.decode(loop.ends["long"].stop_reason)
    assert verdict is not None
    assert verdict.param == "max_tokens"
    assert loop.texts["fine"] == text_of([5, 6], 2)


def test_the_models_limit_ends_a_request_as_its_length() -> None:
    loop = Loop(max_model_len=16)
    loop.add("long", [5, 6, 7, 8], 1000)
    loop.run()
    assert loop.ends["long"].finish_reason is FinishReason.LENGTH
    assert len(loop.texts["long"]) == 12


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stop_token_ends_it_even_when_its_next_step_is_under_way(*, asynchronous: bool) -> None:
    prompt = [5, 6]
    text = text_of(prompt, 5)
    loop = Loop(asynchronous=asynchronous)
    loop.add("a", prompt, 50, stop_token_ids=[text[-1]])
    loop.run()
    assert loop.texts["a"] == text
    assert loop.ends["a"].finish_reason is FinishReason.STOP
    assert loop.worker.steps == (6 if asynchronous else 5)


def test_lengths_are_learned_from_those_who_end_by_themselves() -> None:
    loop = Loop(preset("past-future"))
    seen: list[tuple[str, int]] = []
    observe = loop.scheduler.core.policy.admit.observe
    loop.scheduler.core.policy.admit.observe = lambda ended: (
        seen.append((str(ended.reason), ended.output_tokens)),
        observe(ended),
    )
    stop = text_of([5, 6], 4)[-1]
    loop.add("by token", [5, 6], 40, stop_token_ids=[stop])
    loop.add("by cap", [7, 8], 6)
    loop.run()
    # The front end finds stop strings, and aborts; so it does when a client leaves.
    loop.add("by string", [9, 10], 40, stop=["!"])
    loop.add("gone", [11, 12], 40)
    for _ in range(5):
        loop.step()
    loop.abort("by string")
    loop.abort("gone")
    loop.run()
    assert seen[:2] == [("stop", 4), ("length", 6)]
    assert [reason for reason, _ in seen[2:]] == ["stop", "cancelled"]
    assert all(0 < count < 6 for _, count in seen[2:])


def test_priority_is_vllms_flag_too() -> None:
    loop = Loop(preset("tgi"), blocks=30, policy="priority")
    for i in range(5):
        loop.add(f"low{i}", [5 + i, 6], 60, priority=1)
    loop.add("high", [99, 6], 60, priority=0)
    loop.run()
    order = list(loop.ends)
    assert order.index("high") < 2


def test_a_pause_lets_nobody_in_and_those_inside_go_on() -> None:
    loop = Loop()
    loop.add("inside", [5, 6, 7], 30)
    loop.step()
    loop.step()
    loop.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    loop.add("outside", [5, 6, 8], 4)
    for _ in range(60):
        loop.step()
    assert loop.texts["inside"] == text_of([5, 6, 7], 30)
    assert loop.texts["outside"] == []
    assert not loop.scheduler.has_unfinished_requests()
    loop.scheduler.set_pause_state(PauseState.UNPAUSED)
    loop.run()
    assert loop.texts["outside"] == text_of([5, 6, 8], 4)


def test_a_whole_pause_stops_everything_and_loses_nothing() -> None:
    loop = Loop()
    loop.add("a", [5, 6, 7], 30)
    for _ in range(5):
        loop.step()
    loop.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(4):
        loop.step()
    count = len(loop.texts["a"])
    for _ in range(20):
        loop.step()
    assert len(loop.texts["a"]) == count < 30
    loop.scheduler.set_pause_state(PauseState.UNPAUSED)
    loop.run()
    assert loop.texts["a"] == text_of([5, 6, 7], 30)


def test_lengths_of_a_trace_are_heeded_where_allowed_and_hidden_from_policies() -> None:
    loop = Loop({"bench": {"trace_lengths": True}, **preset("past-future")})
    loop.add("a", [5, 6, 7], 100, extra_args={"trace_output_tokens": 17})
    loop.run()
    assert loop.texts["a"] == text_of([5, 6, 7], 17)
    assert loop.ends["a"].finish_reason is FinishReason.STOP
    loop = Loop()
    loop.add("a", [5, 6, 7], 20, extra_args={"trace_output_tokens": 17})
    loop.run()
    assert len(loop.texts["a"]) == 20


def test_the_oracle_serves_traces_only() -> None:
    with pytest.raises(ValueError, match=r"set penstock\.bench\.trace_lengths"):
        Loop(preset("oracle"))
    loop = Loop({"bench": {"trace_lengths": True}, **preset("oracle")}, blocks=24)
    for i in range(6):
        loop.add(f"r{i}", [10 + i, 11], 60, extra_args={"trace_output_tokens": 20 + i})
    loop.run()
    assert [len(loop.texts[f"r{i}"]) for i in range(6)] == [20, 21, 22, 23, 24, 25]
    assert loop.scheduler.core.evictions == 0


def test_the_hook_works_in_vllms_own_scheduler() -> None:
    from penstock.vllm import TracedScheduler

    loop = Loop(scheduler=TracedScheduler)
    loop.add("a", [5, 6, 7], 100, extra_args={"trace_output_tokens": 17})
    while loop.step():
        pass
    assert loop.texts["a"] == text_of([5, 6, 7], 17)
    assert loop.ends["a"].finish_reason is FinishReason.STOP
