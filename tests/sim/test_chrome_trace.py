"""A trace that a viewer can show: valid events, no overlap in a lane, nothing left out."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

import cyclopts
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sim.chrome_trace import lanes_of
from penstock.sim.command import simulate
from penstock.sim.observe import Residency

app = cyclopts.App(name="penstock", result_action="return_value")
app.command(simulate)
WORDS = (
    "--input 8-40 --output 4-20 --requests 60 --kv-tokens 300 --max-batch 16 "
    "--profile llama-3.1-8b/h100 --rate 150 --slo ttft=0.2,gap=0.05 --preset vllm,tgi"
)


def trace_of(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict, list[dict]]:
    """The trace, and the runs that the command printed."""
    words = ["simulate", *WORDS.split(), "--chrome-trace", str(path), "--json", "-"]
    assert app(words, exit_on_error=False) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return json.load(file), runs


def end_of(event: dict) -> float:
    """In microseconds, to the nanosecond."""
    return round(event["ts"] + event["dur"], 3)


def test_the_whole_run_is_in_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, runs = trace_of(tmp_path / "t.json", capsys)
    assert trace["otherData"]["penstock"]
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "vllm 1", 2: "tgi 1"}
    for process, run in enumerate(runs, 1):
        own = [e for e in events if e["pid"] == process]
        stays = [e for e in own if e["name"].startswith("request ") and e["ph"] == "X"]
        assert len(stays) == run["finished"] + run["evictions"]
        assert sum(e["name"] == "evicted" for e in own) == run["evictions"]
        met = {e["name"] for e in stays if e["args"]["met"]}
        assert len(met) == round(run["attainment"] * 60)
        steps = [e for e in own if e["ph"] == "X" and e["tid"] == 0]
        decode = sum(e["args"]["steps"] for e in steps if e["args"]["decoding"])
        assert decode == run["all_decode_steps"]
        assert max(e["args"]["used"] for e in own if e["name"] == "KV memory, %") <= 100
        assert max(map(end_of, stays)) == max(map(end_of, steps))
    assert runs[0]["evictions"] > 0


def test_slices_in_a_lane_nest_or_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, _ = trace_of(tmp_path / "t.json.gz", capsys)
    lanes = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes[event["pid"], event["tid"]].append((event["ts"], end_of(event)))
    assert len(lanes) > 4
    for slices in lanes.values():
        open_until: list[float] = []
        for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=40))
def test_lanes_are_as_few_as_possible(spans: list[tuple[int, int]]) -> None:
    stays = [
        Residency(str(i), 0.0, start, None, start + length, evicted=False)
        for i, (start, length) in enumerate(sorted(spans))
    ]
    lanes = lanes_of(stays)
    for i, one in enumerate(stays):
        for j, other in enumerate(stays[:i]):
            if lanes[i] == lanes[j]:
                assert other.end <= one.start or one.end <= other.start
    at_once = max((sum(s.start <= t.start < s.end for s in stays) for t in stays), default=0)
    empty = any(stay.end == stay.start for stay in stays)
    assert max(lanes, default=0) == at_once or empty
