"""`penstock validate`: it recovers what made a run, predicts a real one, and refuses bad input."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import app
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import StepLoad
from penstock.core.policies import presets
from penstock.core.types import Capabilities
from penstock.sim.layer_counts import depths, layers_of
from penstock.sim.layer_table import LayerTable, TableError, read_layer_table
from penstock.sim.measured import MeasuredError, MeasuredRequest, places_seen, read_requests
from penstock.sim.pipelined import Pipelined
from penstock.sim.run import Job, run
from penstock.sim.sources import OpenLoop
from penstock.sim.validate import Server, validate
from penstock.sim.validate_command import ServerOptions, server_of

SHARED = Path(__file__).resolve().parents[3] / "shared" / "latency"
LAYERS, HOST = 32, 0.004
KV_TOKENS = 20_000


def kernels(chunk: int, context: int, decoding: int, mean: int) -> float:
    """Attention of one layer in microseconds, linear so that interpolation is exact."""
    return 5 + 0.02 * chunk + 0.001 * context + 0.3 * decoding + 0.01 * mean


def write_tables(folder: Path) -> str:
    """A layer table with the three files; returns its prefix."""
    prefix = folder / "card_tiny_tp1"
    dense = [
        f"{layer},{tokens},{base + 0.4 * tokens}"
        for layer, base in (("embedding", 1), ("layernorm", 2), ("mlp", 80), ("final_layernorm", 2))
        for tokens in (1, 64, 512, 2048)
    ]
    heads = [f"{layer},{n},{50 + n}" for layer in ("lm_head", "sampler") for n in (1, 32, 256)]
    grid = [
        (chunk, context, decoding, mean)
        for chunk in (0, 16, 512, 2048)
        for context in ((0, 1024, 8192) if chunk else (0,))
        for decoding in (0, 1, 32, 256)
        for mean in ((16, 1024, 8192) if decoding else (0,))
        if (chunk or decoding) and chunk + decoding <= 2048
    ]
    attention = [",".join(map(str, (*at, kernels(*at)))) for at in grid]
    for part, head, rows in (
        ("dense", "layer,tokens,time_us", dense),
        ("per_sequence", "layer,sequences,time_us", heads),
        ("attention", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", attention),
    ):
        text = "\n".join((head, *rows)) + "\n"
        Path(f"{prefix}_{part}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return str(prefix)


def write_run(folder: Path, model: LayerTable, depth: int = 2) -> Path:
    """A run of 60 requests that took what the model says."""
    jobs = [
        Job(str(i), 0.05 * i, 100 + 37 * i % 900, 20 + 53 * i % 300, 400, request=i)
        for i in range(60)
    ]
    machine = Capabilities(KV_TOKENS // 16, 16, 128, 2048, KV_TOKENS)
    source = OpenLoop(jobs) if depth == 1 else Pipelined(jobs)
    done = run(source, machine, presets.build("vllm", watermark=1.0), model)
    lines = []
    for record in done.records:
        job, latency = record.job, record.latency
        assert latency.ttft is not None
        assert latency.e2e is not None
        lines.append(
            json.dumps(
                {
                    "input_toks": job.prompt,
                    "output_toks": job.output,
                    "queued_ts": 100 + job.arrival,
                    "first_token_ts": 100 + job.arrival + latency.ttft,
                    "last_token_ts": 100 + job.arrival + latency.e2e,
                }
            )
        )
    path = folder / "card_tiny_requests.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_tables(tmp_path)


def validated(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    with pytest.raises(SystemExit) as left:
        app(["validate", *arguments, "--json", "-"])
    out, err = capsys.readouterr()
    assert left.value.code in {None, 0}, err
    found: dict[str, object] = json.loads(out)
    return found


@pytest.mark.parametrize(
    ("host", "link", "depth"), [(HOST, 0.0, 2), (HOST, 5e-5, 2), (HOST, 0.0, 1), (-0.001, 0.0, 2)]
)
def test_it_recovers_the_times_that_made_a_run(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str], host: float, link: float,
    depth: int,
) -> None:  # fmt: skip
    model = read_layer_table(prefix, LAYERS).with_host(host).with_link(link)
    path = write_run(tmp_path, model, depth)
    parallel = ["--parallel", "2"] if link else []
    found = validated(
        str(path), "--profile", f"llmservingsim:{prefix}", "--kv-tokens", str(KV_TOKENS),
        "--calibrate-on", "30", "--max-batch", "128", "--layers", str(LAYERS), *parallel,
        "--depth", str(depth), "--no-prefix-cache", capsys=capsys,
    )  # fmt: skip
    assert found["predicted"] == 30
    assert found["host"] == pytest.approx(host, rel=0.05)
    assert found["link"] == pytest.approx(link, rel=0.1)
    errors = found["errors"]
    assert isinstance(errors, dict)
    assert set(errors) == {"ttft_mean", "tpot_mean", "e2e_mean", "e2e_per_request"}
    # A time that is off by a microsecond puts an arrival into another step.
    assert all(abs(error) < 0.03 for error in errors.values())


def test_without_a_known_model_the_depth_is_found(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, read_layer_table(prefix, LAYERS).with_host(HOST))
    found = validated(
        str(path), "--profile", f"llmservingsim:{prefix}", "--kv-tokens", str(KV_TOKENS),
        "--calibrate-on", "30", "--max-batch", "128", "--no-prefix-cache", capsys=capsys,
    )  # fmt: skip
    assert found["layers"] == LAYERS


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measured runs are not in this checkout")
def test_a_measured_run_of_vllm_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    found = validated(
        str(SHARED / "vllm_ground_truth" / "RTXPRO6000_Llama-3.1-8B_requests.jsonl.gz"),
        "--profile", f"llmservingsim:{SHARED / 'llmservingsim_RTXPRO6000_llama3.1-8b_tp1'}",
        "--kv-tokens", "400000", "--calibrate-on", "150", capsys=capsys,
    )  # fmt: skip
    errors = found["errors"]
    assert isinstance(errors, dict)
    assert all(abs(error) < 0.03 for error in errors.values()), errors


def test_steps_between_measured_points_are_interpolated(prefix: str) -> None:
    table = read_layer_table(prefix, LAYERS)
    load = StepLoad(40, 40 * 500, 300, 300 * (200 + 150), 1)
    tokens = 340
    dense = 2 * (2 + 0.4 * tokens) + 80 + 0.4 * tokens + kernels(300, 200, 40, 500)
    once = 3 + 2 * 0.4 * tokens + 2 * (50 + 41)
    assert table.seconds(load) == pytest.approx(1e-6 * (LAYERS * dense + once))
    beyond = table.seconds(StepLoad(300, 300 * 10_000))
    assert beyond > table.seconds(StepLoad(256, 256 * 8192))


def rewrite(prefix: str, part: str, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of a table, its head the first of them."""
    path = Path(f"{prefix}_{part}.csv.gz")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(change(lines)).encode()))


def with_column(lines: list[str], name: str, value: object) -> list[str]:
    return [f"{name},{lines[0]}", *(f"{value},{line}" for line in lines[1:])]


def test_later_tables_name_the_kernel_and_the_tokens_that_are_checked_at_once(prefix: str) -> None:
    plain = read_layer_table(prefix, LAYERS)

    def later(lines: list[str]) -> list[str]:
        slower = [line.rpartition(",")[0] + ",99999" for line in lines[1:]]
        checked = with_column([lines[0], *slower], "decode_q_len", 4)[1:]
        once = with_column(lines, "decode_q_len", 1)
        return with_column([*once, *checked], "layer", "attention")

    rewrite(prefix, "attention", later)
    assert read_layer_table(prefix, LAYERS) == plain
    rewrite(prefix, "attention", lambda lines: [*lines, "indexer" + lines[1][len("attention") :]])
    with pytest.raises(TableError, match="has the kernels attention, indexer"):
        read_layer_table(prefix, LAYERS)
    rewrite(prefix, "attention", lambda lines: [*with_column(lines[:1], "x", 1), "1," + lines[-2]])
    with pytest.raises(TableError, match="no rows with a decode_q_len of 1"):
        read_layer_table(prefix, LAYERS)


@pytest.mark.parametrize(
    ("part", "old", "new", "words"),
    [
        ("dense", "layer,tokens", "layer,token", "tokens is missing"),
        ("dense", "mlp,64,", "mlp,x,", r"line 11, column 'tokens' is 'x'"),
        ("attention", "16,0,0,0,", "16,0,0,0,-", r"column 'time_us' is '-5.32'"),
        ("per_sequence", "lm_head,1,51", "lm_head,1,", r"line 2, column 'time_us' is None"),
    ],
)
def test_a_bad_table_is_named(prefix: str, part: str, old: str, new: str, words: str) -> None:
    path = Path(f"{prefix}_{part}.csv.gz")
    text = gzip.decompress(path.read_bytes()).decode()
    assert old in text
    path.write_bytes(gzip.compress(text.replace(old, new, 1).encode()))
    with pytest.raises(TableError, match=words) as caught:
        read_layer_table(prefix, LAYERS)
    assert str(path) in str(caught.value)


def test_kernels_that_would_be_left_out_are_refused(prefix: str) -> None:
    Path(f"{prefix}_linear_attention.csv").touch()
    words = r"card_tiny_tp1_linear_attention.csv: .* cannot be modelled"
    with pytest.raises(TableError, match=words):
        read_layer_table(prefix, LAYERS)


def test_a_missing_table_is_named(prefix: str) -> None:
    Path(f"{prefix}_attention.csv.gz").unlink()
    with pytest.raises(TableError, match=r"card_tiny_tp1_attention.csv.gz: there is no such file"):
        read_layer_table(prefix, LAYERS)


GOOD = {"input_toks": 5, "output_toks": 2, "queued_ts": 1.0, "first_token_ts": 2.0,
        "last_token_ts": 3.0}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: not a JSON object"),
        (json.dumps({**GOOD, "output_toks": 0}), "line 2: output_toks is 0; .* 1 or more"),
        (json.dumps({**GOOD, "queued_ts": "x"}), "line 2: queued_ts is 'x'"),
        (json.dumps({**GOOD, "first_token_ts": 0.5}), "line 2: first_token_ts must lie between"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "input_toks"}), "input_toks is missing"),
        (json.dumps({**GOOD, "last_token_ts": 1.0, "first_token_ts": 1.0}), "must take time"),
        (json.dumps({**GOOD, "input_toks": 5.5}), "line 2: input_toks is 5.5; .* whole number"),
        (json.dumps({**GOOD, "arrival_time": 7.0}), "line 2: arrival_time must be in all lines"),
    ],
)
def test_a_bad_run_is_named(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "x_requests.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{row}\n")
    with pytest.raises(MeasuredError, match=words):
        read_requests(path)


def test_requests_came_when_their_clients_sent_them(tmp_path: Path) -> None:
    """The engine's clock is 1000 s behind, and it takes requests in after a step of 0.5 s."""
    path = tmp_path / "x_requests.jsonl"
    rows = [
        {**GOOD, "arrival_time": 1000 + at, "queued_ts": taken, "first_token_ts": 9.0,
         "last_token_ts": 9.0}
        for at, taken in ((1.3, 1.5), (1.0, 1.0), (1.1, 1.5))
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_requests(path)
    assert [request.arrival for request in found] == pytest.approx([1.0, 1.1, 1.3])
    assert [request.line for request in found] == [2, 3, 1]


@pytest.mark.parametrize(
    ("meta", "server"),
    [
        ({}, Server(9000)),
        ({"vllm_version": "0.13.1"}, Server(9000, depth=1)),
        ({"vllm_version": "0.19.0"}, Server(9000)),
        ({"engine_kwargs": {"async_scheduling": False, "max_num_seqs": 64}},
         Server(9000, depth=1, max_batch=64)),
        ({"engine_kwargs": {"enable_prefix_caching": False, "tensor_parallel_size": 2},
          "kv_cache": {"block_size": 32}},
         Server(9000, block_size=32, parallel=2, prefix_cache=False)),
    ],
)  # fmt: skip
def test_what_the_server_was_is_read_beside_the_run(meta: dict[str, Any], server: Server) -> None:
    assert server_of(ServerOptions(9000), meta) == server


@pytest.mark.parametrize("name", ["data_parallel_size", "pipeline_parallel_size"])
def test_runs_of_several_engines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 2; only runs of one engine"):
        server_of(ServerOptions(9000), {"engine_kwargs": {name: 2}})
    assert server_of(ServerOptions(9000), {"engine_kwargs": {name: 1}}) == Server(9000)


def served(places: int, kv_tokens: int, steps: int = 200) -> list[MeasuredRequest]:
    """Requests of a run whose stamps say when each was first planned."""
    jobs = [Job(str(i), 0.1 * i, 300, 60 + 7 * i % 50, 110, request=i) for i in range(steps)]
    machine = Capabilities(kv_tokens // 16, 16, places, 2048, kv_tokens)
    model = Affine(step=0.05, token=0.0, work=0.0, request=0.0, context=0.0)
    done = run(OpenLoop(jobs), machine, presets.build("vllm", watermark=1.0), model)
    return [
        MeasuredRequest(
            r.job.arrival, 300, r.job.output, r.job.arrival + (r.latency.ttft or 0),
            r.job.arrival + (r.latency.e2e or 0),
            begun_at=r.job.arrival + (r.latency.ttft or 0) - 0.05,
        )
        for r in sorted(done.records, key=lambda record: record.job.arrival)
    ]  # fmt: skip


def test_places_are_seen_where_requests_wait_for_them() -> None:
    assert places_seen(served(16, 100_000)) == 16
    assert places_seen(served(16, 100_000)[:12]) is None, "nobody waited"
    assert places_seen(served(64, 4_000)) is None, "they waited for memory"
    requests = served(16, 100_000)
    assert places_seen([*requests, replace(requests[0], begun_at=None)]) is None
    assert server_of(ServerOptions(9000), {}, 16).max_batch == 16
    assert server_of(ServerOptions(9000), {"engine_kwargs": {"max_num_seqs": 8}}, 16).max_batch == 8


def test_what_is_said_counts_more_than_what_is_beside_the_run() -> None:
    meta = {"engine_kwargs": {"max_num_seqs": 64, "enable_prefix_caching": False}}
    said = ServerOptions(9000, max_batch=8, depth=1, prefix_cache=True)
    assert server_of(said, meta) == Server(9000, max_batch=8, depth=1)
    with pytest.raises(ValueError, match="max_num_seqs is 'x'"):
        server_of(ServerOptions(9000), {"engine_kwargs": {"max_num_seqs": "x"}})


def test_a_request_that_can_never_fit_is_named(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x_requests.jsonl"
    rows = [GOOD, {**GOOD, "input_toks": 600}, GOOD]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit):
        app(["validate", str(path), "--profile", f"llmservingsim:{prefix}", "--layers", "2",
             "--kv-tokens", "607", "--calibrate-on", "1"])  # fmt: skip
    words = "line 2 of the run: input_toks (600) and output_toks (2) can never fit kv_tokens (607)"
    assert words in capsys.readouterr().err


def test_a_step_ahead_is_planned_without_those_who_come_meanwhile() -> None:
    """Steps take 1 s.  b comes in a's first step, of which the second is planned already."""
    jobs = [Job("a", 0.5, 1, 9, 9), Job("b", 0.9, 1, 9, 9), Job("c", 30.2, 1, 1, 1)]
    machine = Capabilities(99, 1, 4, 8, 99)
    model = Affine(step=1.0, token=0.0, work=0.0, request=0.0, context=0.0)
    for source, wanted in ((OpenLoop(jobs), (1.5, 2.5, 31.2)), (Pipelined(jobs), (1.5, 3.5, 31.2))):
        done = run(source, machine, presets.build("vllm", watermark=1.0), model)
        first = {r.job.id: r.track.first_at for r in done.records}
        assert [first[name] for name in "abc"] == pytest.approx(wanted)


def test_who_was_evicted_finds_its_prompt_again(prefix: str) -> None:
    model = read_layer_table(prefix, LAYERS).with_host(HOST)
    requests = [MeasuredRequest(0.01 * i, 600, 300, 4.0, 9.0, i) for i in range(20)]
    kept, dropped = (
        validate(requests, Server(6000, prefix_cache=cached), model, 10) for cached in (True, False)
    )
    assert dropped.evictions > 0
    assert kept.simulated["e2e"] < dropped.simulated["e2e"]


def test_without_second_tokens_there_is_no_time_between_tokens(prefix: str) -> None:
    requests = [MeasuredRequest(float(i), 600, 1, i + 0.3, i + 0.3) for i in range(4)]
    errors = validate(requests, Server(6000), read_layer_table(prefix, LAYERS), 2).errors
    assert math.isnan(errors.tpot_mean)
    assert abs(errors.ttft_mean) < 0.01


def test_too_few_requests_to_predict(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, read_layer_table(prefix, LAYERS))
    with pytest.raises(SystemExit) as left:
        app(["validate", str(path), "--profile", f"llmservingsim:{prefix}", "--kv-tokens", "20000"])
    assert left.value.code == 2
    assert "calibrate_on is 150; it must be from 1 to 59 requests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("meta-llama/Llama-3.1-8B", 32),
        ("RTXPRO6000_Qwen3-32B_requests.jsonl.gz", 64),
        ("llmservingsim_H100_llama3.1-70b_tp4", 80),
        ("Qwen/Qwen2.5-14B-Instruct", 48),
        ("nobody/knows-7b", None),
    ],
)
def test_depths_of_known_models(text: str, layers: int | None) -> None:
    assert layers_of(text) == layers
    assert layers is None or layers in depths()
