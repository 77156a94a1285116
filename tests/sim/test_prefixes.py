"""Shared prefixes of a trace cost their computation once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import penstock
from penstock.sim.simulation import Simulation

PROFILE = "llama-3.1-8b/h100"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Ten requests, seconds apart, whose first two blocks of three are the same."""
    rows = [
        {
            "timestamp": 5000 * i,
            "input_length": 1500,
            "output_length": 4,
            "hash_ids": [1, 2, 10 + i],
        }
        for i in range(10)
    ]
    path = tmp_path / "shared.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def simulated(trace: str, **settings: object) -> Simulation:
    return penstock.simulate(
        "vllm", kv_tokens=20_480, trace=trace, arrivals="trace", profile=PROFILE, **settings
    )


def test_what_is_shared_is_computed_once(trace: str) -> None:
    alone = simulated(trace, block_size=16)
    shared = simulated(trace, block_size=16, prefix_cache=True)
    assert alone.summary.prefix_hits == 0
    assert any("computed anew" in note for note in alone.summary.notes)
    # All but the first begin with two blocks of the trace.
    assert shared.summary.prefix_hits == pytest.approx(9 * 1024 / (10 * 1500))
    assert not any("computed anew" in note for note in shared.summary.notes)
    assert shared.summary.latency["ttft"]["p50"] < 0.6 * alone.summary.latency["ttft"]["p50"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 24}, "block_size is 24; .* divide the trace's blocks of 512"),
        ({"block_size": 16, "scale": 0.5}, "scale is 0.5"),
    ],
)
def test_blocks_must_be_whole(trace: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulated(trace, prefix_cache=True, **settings)


def test_a_trace_must_say_what_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,100,10\n")
    with pytest.raises(ValueError, match="does not say what its requests share"):
        simulated(str(path), prefix_cache=True)


def test_what_an_evicted_request_finds_again_is_no_further_hit(tmp_path: Path) -> None:
    rows = [
        {"timestamp": i, "input_length": 512, "output_length": 400, "hash_ids": [i]}
        for i in range(6)
    ]
    path = tmp_path / "alone.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = penstock.simulate(
        "vllm", kv_tokens=3200, trace=str(path), arrivals="trace", profile=PROFILE, block_size=16,
        prefix_cache=True,
    )  # fmt: skip
    assert done.summary.evictions > 0
    assert done.runs[0].cached_tokens == 0
