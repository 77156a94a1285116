"""The sampler against exact probabilities, Hugging Face's processors and OpenAI's formulas."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.core.sampling import SamplingParams
from penstock.core.types import RequestError, Token
from penstock.engine.sampler import Sampler

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def logits_of(seed: int, rows: int, vocab: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def hugging_face(params: SamplingParams, prompt: list[int], scores: Tensor) -> Tensor:
    """Exact next-token probabilities of one row, by the processors of transformers."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([prompt]), scores[None].clone()).double().softmax(-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=1.7),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(repetition_penalty=1.8),
        SamplingParams(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    ],
    ids=lambda params: repr(params)[15:80],
)
def test_frequencies_are_the_exact_probabilities(params: SamplingParams) -> None:
    rows, vocab, prompt = 6000, 50, [1, 4, 4, 9]
    scores = logits_of(1, 1, vocab, scale=1.5)[0]
    sampler = Sampler(CPU, vocab, seed=3)
    names = tuple(f"r{i}" for i in range(rows))
    for name in names:
        sampler.open(name, prompt, params)
    drawn = Counter(ids(sampler.sample(scores.expand(rows, vocab), names)))
    expected = hugging_face(params, prompt, scores)
    assert set(drawn) <= set(expected.nonzero()[:, 0].tolist())
    likely = [i for i in range(vocab) if expected[i] * rows >= 5]
    rest = rows - sum(drawn[i] for i in likely)
    rest_expected = rows * (1 - sum(float(expected[i]) for i in likely))
    chi2 = sum(
        (drawn[i] - rows * float(expected[i])) ** 2 / (rows * float(expected[i])) for i in likely
    )
    if rest_expected > 5:
        chi2 += (rest - rest_expected) ** 2 / rest_expected
    degrees = max(1, len(likely) - 1)
    # Five standard deviations of the chi-square distribution; the seed is fixed.
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_streams_are_independent_over_time() -> None:
    """One request's successive draws have the right frequencies, and no serial correlation."""
    vocab, steps = 4, 4000
    sampler = Sampler(CPU, vocab)
    sampler.open("a", [0], SamplingParams(seed=11))
    batch = ("a",)
    logits = torch.zeros(1, vocab)
    drawn = [sampler.sample(logits, batch)[0].id for _ in range(steps)]
    pairs = Counter(pairwise(drawn))
    chi2 = sum((pairs[i, j] - steps / 16) ** 2 / (steps / 16) for i in range(4) for j in range(4))
    assert chi2 < 15 + 5 * 30**0.5


@given(seed=st.integers(0, 99), rows=st.integers(1, 9), vocab=st.integers(2, 300))
@settings(max_examples=40, deadline=None)
def test_greedy_is_argmax(seed: int, rows: int, vocab: int) -> None:
    logits = logits_of(seed, rows, vocab)
    sampler = Sampler(CPU, vocab)
    names = [f"{i}" for i in range(rows)]
    for i, name in enumerate(names):
        params = SamplingParams(temperature=0.0, top_k=i, top_p=0.1, min_p=1.0)
        sampler.open(name, [0], params)
    assert ids(sampler.sample(logits, names)) == logits.argmax(-1).tolist()


def test_greedy_rows_stay_exact_between_random_ones() -> None:
    logits = logits_of(0, 40, 90)
    sampler = Sampler(CPU, 90)
    names = tuple(f"{i}" for i in range(40))
    for i, name in enumerate(names):
        sampler.open(name, [0], GREEDY if i % 2 else SamplingParams(temperature=2.0, top_k=40))
    tokens = ids(sampler.sample(logits, names))
    best = logits.argmax(-1).tolist()
    assert tokens[1::2] == best[1::2]
    assert tokens[::2] != best[::2]


def test_repetition_penalty_follows_hugging_face_over_prompt_and_output() -> None:
    vocab, prompt = 30, [3, 5, 5]
    logits = logits_of(5, 1, vocab)
    sampler = Sampler(CPU, vocab)
    sampler.open("a", prompt, SamplingParams(temperature=0.0, repetition_penalty=1.9))
    processor = RepetitionPenaltyLogitsProcessor(1.9)
    history, batch = list(prompt), ("a",)
    for _ in range(20):
        token = sampler.sample(logits, batch)[0].id
        assert token == int(processor(torch.tensor([history]), logits.clone()).argmax())
        history.append(token)
    assert len(set(history)) > 5


@given(presence=st.floats(-2, 2), frequency=st.floats(-2, 2), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_openai_penalties_and_bias_by_formula(presence: float, frequency: float, seed: int) -> None:
    vocab = 20
    logits = logits_of(seed, 1, vocab, scale=1.0)
    bias = {2: 1.5, 7: -100.0}
    params = SamplingParams(
        temperature=0.0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    sampler = Sampler(CPU, vocab)
    sampler.open("a", [2, 2, 2], params)
    sampler.open("other", [2], GREEDY)
    counts: Counter[int] = Counter()
    for _ in range(15):
        expected = logits[0].clone()
        for token, count in counts.items():
            expected[token] -= frequency * count + presence
        for token, value in bias.items():
            expected[token] += value
        drawn, other = sampler.sample(logits.expand(2, vocab), ["a", "other"])
        assert float(expected[drawn.id]) == pytest.approx(float(expected.max()), abs=1e-5)
        assert other.id == int(logits.argmax())
        counts[drawn.id] += 1


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 0, 3, 100]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    logit_bias=st.sampled_from([{}, {5: 2.0}]),
    seed=st.sampled_from([None, 0, 1, 2**63]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@given(params=st.lists(PARAMS, min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_tokens_do_not_depend_on_the_rest_of_the_batch(
    params: list[SamplingParams], data: st.DataObject
) -> None:
    """Any order, any company, any pauses: a request's k-th token is what it is alone."""
    vocab, steps = 200, 4
    table = [logits_of(100 + i, steps, vocab) for i in range(len(params))]

    def prompt(i: int) -> list[int]:
        return [i, i + 1, 5]

    alone: list[list[Token]] = []
    for i, each in enumerate(params):
        sampler = Sampler(CPU, vocab, seed=9)
        sampler.open(f"r{i}", prompt(i), each)
        alone.append([sampler.sample(table[i][k : k + 1], (f"r{i}",))[0] for k in range(steps)])

    sampler = Sampler(CPU, vocab, seed=9)
    together: list[list[Token]] = [[] for _ in params]
    for i, each in enumerate(params):
        sampler.open(f"r{i}", prompt(i), each)
    while unfinished := [i for i, tokens in enumerate(together) if len(tokens) < steps]:
        chosen = data.draw(st.permutations(unfinished))
        chosen = chosen[: data.draw(st.integers(1, len(chosen)))]
        logits = torch.stack([table[i][len(together[i])] for i in chosen])
        for i, token in zip(
            chosen, sampler.sample(logits, tuple(f"r{i}" for i in chosen)), strict=True
        ):
            together[i].append(token)
    assert together == alone


def test_a_seed_names_a_stream_and_the_sampler_seed_the_others() -> None:
    logits = torch.zeros(3, 1000)

    def run(seed: int, names: tuple[str, ...]) -> list[int]:
        sampler = Sampler(CPU, 1000, seed=seed)
        for name, own in zip(names, (7, 7, None), strict=True):
            sampler.open(name, [0], SamplingParams(seed=own))
        return ids(sampler.sample(logits, names))

    first, second, third = run(0, ("a", "b", "c"))
    assert first == second != third
    assert run(0, ("a", "b", "c")) == [first, second, third]
    assert run(1, ("x", "y", "c"))[:2] == [first, second]
    assert run(1, ("a", "b", "c"))[2] != third


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_of_the_raw_logits(temperature: float) -> None:
    vocab = 64
    logits = logits_of(2, 3, vocab)
    exact = logits.log_softmax(-1)
    sampler = Sampler(CPU, vocab)
    wanted = [None, 0, 5]
    for i, count in enumerate(wanted):
        params = SamplingParams(
            temperature=temperature, top_k=4, presence_penalty=1.0, logprobs=count
        )
        sampler.open(f"{i}", [0], params)
    plain, own, alternatives = sampler.sample(logits, ("0", "1", "2"))
    assert plain.logprob is None
    assert plain.top == own.top == ()
    assert own.logprob == float(exact[1, own.id])
    assert alternatives.logprob == float(exact[2, alternatives.id])
    top = exact[2].topk(5)
    assert alternatives.top == tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def test_logits_stay_as_they_were() -> None:
    logits = logits_of(4, 2, 40)
    before = logits.clone()
    sampler = Sampler(CPU, 40)
    params = SamplingParams(temperature=0.5, top_p=0.5, repetition_penalty=1.5, logit_bias={1: 5.0})
    sampler.open("a", [1], params)
    sampler.open("b", [1], params)
    sampler.sample(logits, ("a", "b"))
    assert torch.equal(logits, before)


def test_a_reopened_id_starts_its_stream_and_its_counts_again() -> None:
    vocab, batch = 500, ("a", "b")
    logits = logits_of(8, 2, vocab)
    sampler = Sampler(CPU, vocab)
    params = SamplingParams(temperature=2.0, repetition_penalty=1.5)

    def run() -> list[list[int]]:
        for name in batch:
            sampler.open(name, [1, 2], params)
        tokens = [ids(sampler.sample(logits, batch)) for _ in range(3)]
        for name in batch:
            sampler.close(name)
        return tokens

    first = run()
    assert first[0] != first[1]
    assert run() == first


def test_a_request_does_not_inherit_anothers_prompt() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    sampler = Sampler(CPU, 3)
    params = SamplingParams(temperature=0.0, repetition_penalty=3.0)
    sampler.open("a", [0, 1], params)
    assert ids(sampler.sample(logits, ("a",))) == [2]
    sampler.close("a")
    sampler.open("b", [1], params)
    assert ids(sampler.sample(logits, ("b",))) == [0]


def test_an_unchanged_batch_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(CPU, 10)
    for name in "ab":
        sampler.open(name, [0], SamplingParams())
    built: list[object] = []
    build = sampler._build
    monkeypatch.setattr(sampler, "_build", lambda names: built.append(names) or build(names))
    batch, logits = ("a", "b"), torch.zeros(2, 10)
    for _ in range(3):
        sampler.sample(logits, batch)
    assert built == [batch]
    names = ["a", "b"]
    sampler.sample(logits, names)
    names.reverse()
    sampler.sample(logits, names)
    assert len(built) == 3


def test_state_is_given_back() -> None:
    sampler = Sampler(CPU, 30)
    params = SamplingParams(frequency_penalty=0.5, logit_bias={1: 1.0})
    for round_ in range(5):
        names = tuple(f"{round_}-{i}" for i in range(100))
        for name in names:
            sampler.open(name, [1], params)
        sampler.sample(torch.zeros(100, 30), names)
        for name in names:
            sampler.close(name)
    assert len(sampler._counts.in_output) == 128
    assert len(sampler._table.rows) == 128
    assert sampler._biases == {}


def test_errors_name_the_field() -> None:
    sampler = Sampler(CPU, 10)
    with pytest.raises(RequestError, match=r"logit_bias names token 10; .* 0 to 9") as bias:
        sampler.open("a", [0], SamplingParams(logit_bias={10: 1.0}))
    assert bias.value.field == "logit_bias"
    with pytest.raises(RequestError, match="prompt names token -1") as prompt:
        sampler.open("a", [-1], SamplingParams(repetition_penalty=1.1))
    assert prompt.value.field == "prompt"
    sampler.open("a", [0], SamplingParams())
    with pytest.raises(ValueError, match="a is open"):
        sampler.open("a", [0], SamplingParams())
    with pytest.raises(ValueError, match=r"logits have shape \(2, 10\); it must be \(1, 10\)"):
        sampler.sample(torch.zeros(2, 10), ("a",))
    with pytest.raises(KeyError, match="zzz"):
        sampler.sample(torch.zeros(1, 10), ("zzz",))
    sampler.close("a")
    with pytest.raises(KeyError, match="a"):
        sampler.close("a")


def test_limits_wider_than_the_vocabulary_are_no_limit() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0]])
    sampler = Sampler(CPU, 3)
    sampler.open("a", [0], SamplingParams(top_k=50, logprobs=20, seed=1))
    batch = ("a",)
    tokens = [sampler.sample(logits, batch)[0] for _ in range(60)]
    assert set(ids(tokens)) == {0, 1, 2}
    assert all(len(token.top) == 3 for token in tokens)


def test_tiny_temperatures_are_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0e-6, -1.0]])
    sampler = Sampler(CPU, 3)
    sampler.open("a", [0], SamplingParams(temperature=1e-40))
    assert ids(sampler.sample(logits, ["a"])) == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    vocab, rows, steps = 32_000, 24, 8
    rng = np.random.default_rng(0)
    names = tuple(f"{i}" for i in range(rows))
    table = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([1.0, 0.9])),
            top_k=int(rng.choice([0, 40])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            frequency_penalty=float(rng.choice([0.0, 0.3])),
        )
        for _ in names
    ]
    drawn = []
    for device in (CPU, torch.device("cuda")):
        sampler = Sampler(device, vocab)
        for name, params in zip(names, table, strict=True):
            sampler.open(name, [1, 2, 3], params)
        drawn.append(
            [ids(sampler.sample(logits_of(k, rows, vocab).to(device), names)) for k in range(steps)]
        )
    same = (np.array(drawn[0]) == np.array(drawn[1])).mean()
    assert same > 0.99  # rounding may move a draw that falls on an edge


def test_the_least_repetition_penalty_keeps_scores_finite() -> None:
    with pytest.raises(ValueError, match=r"1e-38; it must be in \[0\.01, 10\]"):
        SamplingParams(repetition_penalty=1e-38)
    sampler = Sampler(CPU, 3)
    sampler.open("a", [1], SamplingParams(repetition_penalty=0.01, seed=1))
    sampled = sampler.sample(torch.tensor([[30.0, 20.0, -30.0]]), ("a",))
    assert ids(sampled) == [1]
