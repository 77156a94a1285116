"""What the native engine says no to, when requests end, and what happens when a step fails."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from penstock.core.engine import Ticket, Work
from penstock.core.memory import prefix_keys
from penstock.core.sampling import SamplingParams
from penstock.core.types import (
    Capabilities,
    Chunk,
    Drop,
    FinishReason,
    PrefixKey,
    RequestError,
    Start,
    StepPlan,
    StepResult,
)
from penstock.engine import LoadedModel, PlanError, load_random
from penstock.engine.attention import PagedLayer
from penstock.engine.errors import KVOverflowError
from penstock.engine.runner import Runner
from tests.engine.drive import GREEDY, TIGHT, Job, Recorder, generate, prompts, serve
from tests.engine.tiny import VOCAB, tiny_config

PROMPT = (7, 3, 41, 12, 12, 60, 5, 33, 18, 2, 9)
EOS = 99


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_random(tiny_config("qwen3", eos_token_id=EOS), seed=5)


@pytest.fixture
def engine(model: LoadedModel) -> Iterator[Recorder]:
    engine = Recorder(model, TIGHT)
    yield engine
    engine.close()


def plan(
    number: int,
    *,
    drops: tuple[Drop, ...] = (),
    forget: tuple[PrefixKey, ...] = (),
    starts: tuple[Start, ...] = (),
    chunks: tuple[Chunk, ...] = (),
    decode: tuple[str, ...] = (),
) -> StepPlan:
    return StepPlan(number, drops, forget, starts, chunks, decode)


def run(engine: Recorder, step: StepPlan) -> StepResult:
    return engine.collect(engine.submit(step))


def enter(name: str, tokens: int, publish: tuple[tuple[int, PrefixKey], ...] = ()) -> StepPlan:
    chunk = Chunk(name, 0, tokens, samples=True, publish=publish)
    return plan(1, starts=(Start(name, tokens),), chunks=(chunk,))


def test_facts(engine: Recorder) -> None:
    assert engine.vocab_size == VOCAB
    assert engine.model_type == "qwen3"
    assert engine.eos_ids == {EOS}
    # Embedding and output head, and per layer: attention, gated MLP, norms.
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64 + 2 * 16
    assert engine.parameters == 2 * VOCAB * 64 + 2 * layer + 64


@pytest.mark.parametrize(
    ("work", "field"),
    [
        (Work((1, VOCAB)), "prompt"),
        (Work((1, -1)), "prompt"),
        (Work(()), "prompt"),
        (Work((1.5, 2)), "prompt"),  # type: ignore[arg-type]
        (Work((1,), SamplingParams(stop_token_ids=(VOCAB,))), "stop_token_ids"),
        (Work((1,), SamplingParams(logit_bias={VOCAB: 1.0})), "logit_bias"),
        (Work((1,), trace_length=0), "trace_length"),
    ],
)
def test_refuses_a_request(engine: Recorder, work: Work, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.open("a", work)
    assert caught.value.field == field
    engine.open("a", Work(PROMPT))  # nothing of it is left behind


def test_refuses_an_id_in_use(engine: Recorder) -> None:
    engine.open("a", Work(PROMPT))
    with pytest.raises(RequestError, match="in use"):
        engine.open("a", Work(PROMPT))


@pytest.mark.parametrize(
    "wrong",
    [
        plan(2),
        plan(1, decode=("a",)),
        plan(1, drops=(Drop("a", final=True),)),
        plan(1, forget=(b"never published",)),
        plan(1, starts=(Start("a", 10),)),
        plan(1, starts=(Start("nobody", 11),)),
        plan(1, starts=(Start("a", 11, (b"never published",)),)),
        plan(1, starts=(Start("a", 11),), chunks=(Chunk("a", 4, 7, samples=True),)),
        plan(1, starts=(Start("a", 11),), chunks=(Chunk("a", 0, 12, samples=True),)),
        plan(1, starts=(Start("a", 11),), chunks=(Chunk("a", 0, 11, samples=False),)),
        plan(1, starts=(Start("a", 11),), chunks=(Chunk("a", 0, 10, samples=True),)),
        plan(1, starts=(Start("a", 11),), decode=("a",)),
        plan(1, starts=(Start("a", 11), Start("a", 11))),
        enter("a", 11, publish=((2, b"not full"),)),
        enter("a", 11, publish=((0, b"twice"), (1, b"twice"))),
    ],
)
def test_plan_that_breaks_the_protocol(engine: Recorder, wrong: StepPlan) -> None:
    engine.open("a", Work(PROMPT))
    with pytest.raises(PlanError):
        engine.submit(wrong)


def test_more_blocks_than_there_are(engine: Recorder) -> None:
    engine.open("a", Work([1] * 33))
    engine.open("b", Work([2] * 33))
    run(engine, enter("a", 33))
    with pytest.raises(KVOverflowError, match="9 KV blocks are needed but 5 of 14 are free"):
        engine.submit(plan(2, starts=(Start("b", 33),), chunks=(Chunk("b", 0, 33, samples=True),)))


def test_more_requests_than_max_batch(engine: Recorder) -> None:
    for name in "abcde":
        engine.open(name, Work((1,)))
    with pytest.raises(PlanError, match="max_batch"):
        engine.submit(plan(1, starts=tuple(Start(name, 1) for name in "abcde")))


def test_results_are_collected_once_and_in_order(engine: Recorder) -> None:
    with pytest.raises(PlanError):
        engine.collect(Ticket(1))
    ticket = engine.submit(plan(1))
    with pytest.raises(PlanError):
        engine.submit(plan(2))
    engine.collect(ticket)
    with pytest.raises(PlanError):
        engine.collect(ticket)


def test_discard_of_a_running_request(engine: Recorder) -> None:
    engine.open("a", Work(PROMPT))
    run(engine, enter("a", 11))
    with pytest.raises(PlanError):
        engine.discard("a")


def test_one_model_runs_in_one_engine(model: LoadedModel, engine: Recorder) -> None:
    with pytest.raises(RuntimeError, match="another engine"):
        Recorder(model, TIGHT)
    engine.close()
    second = Recorder(model, TIGHT)
    engine.close()  # not a second time: the model is the second engine's now
    second.open("a", Work(PROMPT))
    assert run(second, enter("a", 11)).failed == {}
    second.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_closing_gives_all_memory_back(dtype: str) -> None:
    model = load_random(tiny_config("llama"), dtype=dtype)
    engine = Recorder(model, TIGHT)
    serve(engine, [Job(PROMPT, 3)])
    # A norm's forward may fall back to the norm's own: a few numbers that wait for the collector.
    held = [
        weakref.ref(child)
        for child in model.module.modules()
        if not type(child).__name__.endswith("Norm")
    ]
    held += [weakref.ref(layer) for layer in engine._runner.layers]
    del model
    engine.close()
    assert [type(one()).__name__ for one in held if one() is not None] == []
    assert engine.vocab_size == VOCAB  # what it was stays known
    engine.close()


@pytest.mark.parametrize(
    "place",
    [
        "penstock.engine.runner.Runner._forward",
        "penstock.engine.runner.PagedBatch",
        "penstock.engine.native.Rows",
        "penstock.engine.native.Sampler",
        "penstock.engine.native.Steps",
    ],
)
def test_a_model_whose_engine_could_not_be_made_runs_in_another(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(place, no_memory)
        with pytest.raises(MemoryError):
            Recorder(model, TIGHT)
    Recorder(model, TIGHT).close()


def test_a_cache_that_does_not_fit_leaves_the_model_free(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PagedLayer] = []

    def one_fits(*arguments: Any) -> PagedLayer:
        if made:
            raise MemoryError
        made.append(PagedLayer(*arguments))
        return made[0]

    with monkeypatch.context() as patch:
        patch.setattr("penstock.engine.runner.PagedLayer", one_fits)
        with pytest.raises(MemoryError):
            Recorder(model, TIGHT)
    Recorder(model, TIGHT).close()


def test_only_one_plan_in_flight(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="depth is 2"):
        Recorder(model, replace(TIGHT, depth=2))


def test_memory_is_idle_at_the_end(engine: Recorder) -> None:
    serve(engine, [Job(prompt, 10) for prompt in prompts()])
    engine.check()
    pool = engine._rows.pool
    assert pool.free + pool.cached == TIGHT.kv_blocks
    assert len(engine._rows) == 0


def eos_forced(**sampling: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, logit_bias={EOS: 100.0}, **sampling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "reason", "length"),
    [
        (Job(PROMPT, 6, eos_forced()), FinishReason.STOP, 1),
        (Job(PROMPT, 6, eos_forced(ignore_eos=True)), FinishReason.LENGTH, 6),
        (
            Job(PROMPT, 6, eos_forced(ignore_eos=True, stop_token_ids=(3, EOS))),
            FinishReason.STOP,
            1,
        ),
        (Job(PROMPT, 6, eos_forced(stop_token_ids=(EOS,)), 4), FinishReason.STOP, 4),
        (Job(PROMPT, 6, GREEDY, 6), FinishReason.STOP, 6),
        (Job(PROMPT, 6, GREEDY, 7), FinishReason.LENGTH, 6),
        (Job(PROMPT, 1, GREEDY), FinishReason.LENGTH, 1),
    ],
)
def test_how_requests_end(engine: Recorder, job: Job, reason: FinishReason, length: int) -> None:
    outcome = serve(engine, [job])
    assert outcome.ended["0"].reason is reason
    assert len(outcome.texts["0"]) == length


def test_stop_tokens_are_each_requests_own(engine: Recorder) -> None:
    free = serve(engine, [Job(PROMPT, 8)]).texts["0"]
    stop = free[3]
    jobs = [Job(PROMPT, 8), Job(PROMPT, 8, SamplingParams(temperature=0, stop_token_ids=(stop,)))]
    fresh = Recorder(load_random(tiny_config("qwen3", eos_token_id=EOS), seed=5), TIGHT)
    texts = serve(fresh, jobs).texts
    assert texts["0"] == free
    assert texts["1"] == free[: free.index(stop) + 1]


def test_seeded_sampling_does_not_depend_on_memory(model: LoadedModel) -> None:
    """The random stream goes on where it was after an eviction."""
    hot = SamplingParams(temperature=1.0, top_p=0.9, seed=11, repetition_penalty=1.2, logprobs=2)
    jobs = [Job(prompt, 10, hot) for prompt in prompts()]
    roomy = Capabilities(400, 4, 8, 200, 40)
    outcomes = []
    for capabilities in (TIGHT, roomy):
        engine = Recorder(model, capabilities)
        outcomes.append(serve(engine, jobs))
        engine.close()
    assert outcomes[0].evictions > 0
    assert outcomes[1].evictions == 0
    assert outcomes[0].texts == outcomes[1].texts
    for index, tokens in outcomes[0].tokens.items():
        for ours, theirs in zip(tokens, outcomes[1].tokens[index], strict=True):
            assert len(ours.top) == 2
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


Forward = Callable[[Runner, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], None]], None]:
    """Lets a function look at the tokens of each forward pass first."""
    genuine: Forward = Runner._forward

    def put(look: Callable[[Tensor], None]) -> None:
        def forward(runner: Runner, tokens: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
            look(tokens)
            return genuine(runner, tokens, positions, keep)

        monkeypatch.setattr(Runner, "_forward", forward)

    return put


BAD = 127


def chokes(tokens: Tensor) -> None:
    if (tokens == BAD).any():
        msg = "chokes on 127"
        raise RuntimeError(msg)


def test_a_failing_request_fails_alone(
    engine: Recorder, poison: Callable[[Callable[[Tensor], None]], None]
) -> None:
    never = SamplingParams(temperature=0.0, logit_bias={BAD: -100.0})
    healthy = [prompt for prompt in prompts() if BAD not in prompt]
    expected = serve(engine, [Job(prompt, 10, never) for prompt in healthy]).texts
    fresh = Recorder(load_random(tiny_config("qwen3", eos_token_id=EOS), seed=5), TIGHT)
    poison(chokes)
    sick = [*healthy[:2], [5, BAD, 6], *healthy[2:]]
    outcome = serve(fresh, [Job(prompt, 10, never) for prompt in sick])
    assert outcome.ended["2"].reason is FinishReason.FAILED
    assert "chokes on 127" in outcome.ended["2"].detail
    others = [outcome.texts[str(index)] for index in range(len(sick)) if index != 2]
    assert others == list(expected.values())


def test_blocks_of_a_failed_step_are_never_shared(
    engine: Recorder, poison: Callable[[Callable[[Tensor], None]], None]
) -> None:
    keys = prefix_keys(PROMPT, 4)
    for name in "abc":
        engine.open(name, Work(PROMPT, GREEDY))
    broken = True

    def fails_at_first(tokens: Tensor) -> None:
        if broken and len(tokens) > 1:
            msg = "out of memory"
            raise RuntimeError(msg)

    poison(fails_at_first)
    result = run(engine, enter("a", 11, publish=tuple(enumerate(keys))))
    assert result.failed == {"a": "the forward pass failed: out of memory"}
    broken = False
    # The scheduler takes the blocks for cached; beginning with them must not give nonsense.
    follower = plan(
        2,
        drops=(Drop("a", final=True),),
        starts=(Start("b", 11, keys),),
        chunks=(Chunk("b", 8, 3, samples=True),),
    )
    result = run(engine, follower)
    assert list(result.failed) == ["b"]
    assert result.tokens == {}
    result = run(
        engine,
        plan(
            3,
            drops=(Drop("b", final=True),),
            forget=keys,
            starts=(Start("c", 11),),
            chunks=(Chunk("c", 0, 11, samples=True, publish=tuple(enumerate(keys))),),
        ),
    )
    assert result.failed == {}
    assert list(result.tokens) == ["c"]


@pytest.fixture
def answers_nan_after_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine: Forward = Runner._forward

    def forward(runner: Runner, tokens: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        logits = genuine(runner, tokens, positions, keep)
        return logits.masked_fill((tokens[keep] == BAD)[:, None], float("nan"))

    monkeypatch.setattr(Runner, "_forward", forward)


@pytest.mark.usefixtures("answers_nan_after_bad")
def test_output_that_is_not_a_number(engine: Recorder) -> None:
    for name, prompt in (("a", (1, 2)), ("b", (3, BAD)), ("c", (4, 5))):
        engine.open(name, Work(prompt, GREEDY))
    result = run(
        engine,
        plan(
            1,
            starts=tuple(Start(name, 2) for name in "abc"),
            chunks=tuple(Chunk(name, 0, 2, samples=True) for name in "abc"),
        ),
    )
    assert result.failed == {"b": "the model's output for it is not a number"}
    assert list(result.tokens) == ["a", "c"]
    assert run(engine, plan(2, drops=(Drop("b", final=True),), decode=("a", "c"))).failed == {}


@pytest.mark.usefixtures("answers_nan_after_bad")
def test_a_request_that_has_failed_does_not_go_on(engine: Recorder) -> None:
    names = ("a", "b")
    engine.open("a", Work((1, 2), GREEDY))
    says_bad = SamplingParams(temperature=0.0, logit_bias={BAD: 100.0})
    engine.open("b", Work((3, 4), says_bad))
    run(
        engine,
        plan(
            1,
            starts=tuple(Start(name, 2) for name in names),
            chunks=tuple(Chunk(name, 0, 2, samples=True) for name in names),
        ),
    )
    assert list(run(engine, plan(2, decode=names)).failed) == ["b"]
    with pytest.raises(PlanError):
        engine.submit(plan(3, decode=names))


def _dead(_: Tensor) -> None:
    msg = "the device is gone"
    raise RuntimeError(msg)


def test_a_model_that_always_fails_is_not_a_requests_fault(
    engine: Recorder, poison: Callable[[Callable[[Tensor], None]], None]
) -> None:
    poison(_dead)
    for name in "ab":
        engine.open(name, Work((1, 2)))
    step = plan(
        1,
        starts=(Start("a", 2), Start("b", 2)),
        chunks=(Chunk("a", 0, 2, samples=True), Chunk("b", 0, 2, samples=True)),
    )
    with pytest.raises(RuntimeError, match=r"no request of a step.*the device is gone"):
        engine.submit(step)


def test_a_model_that_fails_on_a_lone_request_and_on_anything_is_dead(
    engine: Recorder, poison: Callable[[Callable[[Tensor], None]], None]
) -> None:
    poison(_dead)
    engine.open("a", Work((1, 2)))
    with pytest.raises(RuntimeError, match=r"no request of a step.*the device is gone"):
        engine.submit(enter("a", 2))


def test_finding_out_whether_the_model_is_dead_costs_nobody_else_their_kv(
    engine: Recorder, poison: Callable[[Callable[[Tensor], None]], None]
) -> None:
    expected = serve(engine, [Job(PROMPT, 4)]).texts["0"]
    assert BAD not in expected
    engine.close()
    fresh = Recorder(load_random(tiny_config("qwen3", eos_token_id=EOS), seed=5), TIGHT)
    poison(chokes)
    fresh.open("a", Work(PROMPT, GREEDY))
    fresh.open("b", Work((5, BAD), GREEDY))
    found = [run(fresh, enter("a", 11)).tokens["a"].id]
    alone = plan(2, starts=(Start("b", 2),), chunks=(Chunk("b", 0, 2, samples=True),))
    assert run(fresh, alone).failed == {"b": "the forward pass failed: chokes on 127"}
    for number in range(3, 6):
        drops = (Drop("b", final=True),) if number == 3 else ()
        found.append(run(fresh, plan(number, drops=drops, decode=("a",))).tokens["a"].id)
    assert found == expected
    fresh.close()


def test_same_decode_tuple_is_looked_up_once(
    engine: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in which nothing changed does no work per request."""
    names = tuple("abc")
    for name in names:
        engine.open(name, Work((1, 2), GREEDY))
    run(
        engine,
        plan(
            1,
            starts=tuple(Start(name, 2) for name in names),
            chunks=tuple(Chunk(name, 0, 2, samples=True) for name in names),
        ),
    )
    run(engine, plan(2, decode=names))
    lookups: list[object] = []
    genuine = engine._rows.of
    monkeypatch.setattr(engine._rows, "of", lambda ids: lookups.append(ids) or genuine(ids))
    for number in range(3, 8):
        run(engine, plan(number, decode=names))
    assert lookups == []
    assert np.array_equal(engine._rows.total[engine._rows.of(names)], [9, 9, 9])


def test_a_dropped_request_does_not_decode_on(engine: Recorder) -> None:
    names = ("a", "b")
    for name in names:
        engine.open(name, Work((1, 2), GREEDY))
    run(
        engine,
        plan(
            1,
            starts=tuple(Start(name, 2) for name in names),
            chunks=tuple(Chunk(name, 0, 2, samples=True) for name in names),
        ),
    )
    run(engine, plan(2, decode=names))
    with pytest.raises(PlanError, match="request b computes but has not started"):
        engine.submit(plan(3, drops=(Drop("b", final=False),), decode=names))


@pytest.fixture(scope="module")
def long_texts() -> list[list[int]]:
    return generate(tiny_config("qwen3", eos_token_id=EOS), 5, prompts(), 40)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_long_decode_in_step(
    model: LoadedModel, long_texts: list[list[int]], block_size: int
) -> None:
    """Step arrays that are advanced in place stay right over many blocks."""
    roomy = Capabilities(600 // block_size, block_size, 8, 64, 120)
    free = SamplingParams(temperature=0.0, ignore_eos=True)
    engine = Recorder(model, roomy)
    outcome = serve(engine, [Job(prompt, 40, free) for prompt in prompts()])
    engine.close()
    repeated = sum(
        plan.decode is before.decode for before, plan in itertools.pairwise(outcome.plans)
    )
    assert repeated > 30
    assert [outcome.texts[str(index)] for index in range(len(long_texts))] == long_texts
