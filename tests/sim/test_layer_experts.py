"""Mixtures of experts in layer tables: how many are activated, what they take, what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from penstock.cli import app
from penstock.core.forecast.latency.base import StepLoad
from penstock.sim.layer_table import Experts, TableError, read_layer_table
from tests.conformance.latency_kit import check_latency_model
from tests.sim.test_validate import HOST, KV_TOKENS, LAYERS, rewrite, validated, write_run
from tests.sim.test_validate import write_tables as write_dense

EACH, COUNT = 4, 32


def taken(tokens: float, activated: float) -> float:
    """A mixture of experts of one layer in microseconds, linear so that interpolation is exact."""
    return 10 + 3 * activated + 0.05 * tokens


def write_experts(prefix: str, spread: tuple[int, ...] = (1, 2)) -> Path:
    """Experts measured as LLMServingSim does: twice as many each time, as far as they can be."""
    rows = [
        f"{ep},{tokens},{activated},{taken(tokens, activated) / ep}"
        for ep in spread
        for tokens in (1, 2, 4, 16, 64, 512, 2048)
        for activated in (EACH // ep * 2**i for i in range(4))
        if activated <= min(COUNT, EACH * tokens) // ep
    ]
    path = Path(f"{prefix}_moe.csv")
    path.write_text("\n".join(("ep,tokens,activated_experts,time_us", *rows)) + "\n")
    return path


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dense(tmp_path)


def decoding(tokens: int) -> StepLoad:
    return StepLoad(tokens, tokens * 500)


def test_even_routing_activates_what_all_choices_do_on_average() -> None:
    pairs = list(itertools.combinations(range(5), 2))
    for tokens in (1, 2, 3):
        choices = list(itertools.product(pairs, repeat=tokens))
        distinct = sum(len(set().union(*choice)) for choice in choices) / len(choices)
        assert Experts({}, 2, 5).activated(tokens) == pytest.approx(distinct)
    assert Experts({}, 2, 5).activated(1000) == pytest.approx(5)
    assert Experts({}, 5, 5).activated(1) == 5


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 20, 340, 4000])
def test_experts_are_added_to_every_layer(prefix: str, tokens: int) -> None:
    """With 3 and 7 tokens, more are activated than 2 and 4 tokens can be measured with."""
    without = read_layer_table(prefix, LAYERS)
    write_experts(prefix)
    for ep in (1, 2):
        table = read_layer_table(prefix, LAYERS, ep)
        activated = COUNT * (1 - (1 - EACH / COUNT) ** tokens) / ep
        more = table.seconds(decoding(tokens)) - without.seconds(decoding(tokens))
        assert more == pytest.approx(1e-6 * LAYERS * taken(tokens, activated) / ep)


def test_prompts_pass_the_experts_too(prefix: str) -> None:
    without = read_layer_table(prefix, LAYERS)
    write_experts(prefix)
    load = StepLoad(40, 40 * 500, 300, 300 * 150, 1)
    more = read_layer_table(prefix, LAYERS).seconds(load) - without.seconds(load)
    assert more == pytest.approx(1e-6 * LAYERS * taken(340, COUNT))


def test_more_work_is_never_faster(prefix: str) -> None:
    write_experts(prefix)
    check_latency_model(read_layer_table(prefix, LAYERS).with_host(0.001))


def test_rows_that_repeat_count_by_their_mean(prefix: str) -> None:
    path = write_experts(prefix)
    plain = read_layer_table(prefix, LAYERS)
    head, *rows = path.read_text().splitlines()
    apart = [f"{at},{float(time) + by}" for at, _, time in
             (row.rpartition(",") for row in rows) for by in (1, -1)]  # fmt: skip
    path.write_text("\n".join((head, *reversed(apart))))
    again = read_layer_table(prefix, LAYERS)
    assert again.seconds(decoding(20)) == pytest.approx(plain.seconds(decoding(20)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("activated_experts", "experts", "activated_experts is missing"),
        ("1,2,8,", "1,2,x,", "line 4, column 'activated_experts' is 'x'"),
        ("1,1,4,", "1,1,0,", "column 'activated_experts' has 0; a token activates 1 or more"),
    ],
)
def test_a_bad_table_is_named(prefix: str, old: str, new: str, words: str) -> None:
    path = write_experts(prefix)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(TableError, match=words) as caught:
        read_layer_table(prefix, LAYERS)
    assert str(path) in str(caught.value)


def test_experts_spread_otherwise_than_measured_are_refused(prefix: str) -> None:
    write_experts(prefix)
    with pytest.raises(TableError, match=r"tp1_moe.csv: column 'ep' has 1, 2; it must have 8"):
        read_layer_table(prefix, LAYERS, 8)


def test_layers_of_two_kinds_are_refused(prefix: str) -> None:
    rewrite(prefix, "dense", lambda lines: [x.replace("mlp", "gate_up_proj") for x in lines])
    read_layer_table(prefix, LAYERS)
    write_experts(prefix)
    words = r"tp1_dense: column 'layer' has gate_up_proj of an MLP, and there is .*tp1_moe.csv"
    with pytest.raises(TableError, match=words):
        read_layer_table(prefix, LAYERS)


def test_a_model_without_mlp_and_experts_is_refused(prefix: str) -> None:
    rewrite(prefix, "dense", lambda lines: [x.replace("mlp", "o_proj") for x in lines])
    words = r"'layer' has none of gate_up_proj, act_fn, down_proj; .* needs .*tp1_moe.csv.gz"
    with pytest.raises(TableError, match=words):
        read_layer_table(prefix, LAYERS)
    write_experts(prefix)
    read_layer_table(prefix, LAYERS)


def test_a_run_of_a_mixture_of_experts_is_recovered(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experts(prefix)
    path = write_run(tmp_path, read_layer_table(prefix, LAYERS, 2).with_host(HOST))
    meta = {"engine_kwargs": {"tensor_parallel_size": 2, "enable_expert_parallel": True}}
    arguments = (
        str(path), "--profile", f"llmservingsim:{prefix}", "--kv-tokens", str(KV_TOKENS),
        "--calibrate-on", "30", "--max-batch", "128", "--layers", str(LAYERS),
        "--no-prefix-cache",
    )  # fmt: skip
    (tmp_path / "card_tiny_meta.json").write_text(json.dumps(meta))
    assert validated(*arguments, capsys=capsys)["host"] == pytest.approx(HOST, rel=0.05)
    write_experts(prefix, spread=(1,))
    with pytest.raises(SystemExit) as left:
        app(["validate", *arguments])
    assert left.value.code == 2
    assert "column 'ep' has 1; it must have 2" in capsys.readouterr().err
