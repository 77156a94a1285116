"""Two live instances, and the simulator's prediction for them.

    python benchmarks/slices/live.py [--trials N]

Each preset serves the same requests on two instances of a random Llama of 32 million parameters,
one CPU thread each, driven by ``penstock bench`` in an open loop: lengths of ShareGPT over 8, ended
at their true lengths by the server's test hook, which no policy sees.  ``penstock simulate`` then
replays the same requests with step times that were recorded with *other* requests at that rate,
under ``past-future`` before and under ``scls`` after.  A shared machine's speed doubles and halves
within minutes, so one number is taken from the run itself: by how much its steps, all together,
took longer than those times say (``pace``), and times are multiplied by it.  The rate is set once
for the machine: the first at which the simulator has ``sls`` produce less than 95 % of what
``past-future`` does.  Compared are the ranking by mean response, mean, median and p90 response,
throughput, and the busier instance's share of the time that both computed.

Expected, written before it was measured: the same ranking; response times within 10 % for presets
that keep up, more for those that fall behind, whose response times add up every error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "past_future_live"))

import model
from live_pair import fit, penstock, record, wait_for_both

from penstock.bench.local import revision, serve
from penstock.bench.result import machine
from penstock.core.forecast.latency.fit import Sample
from penstock.sim import profiles
from penstock.sim.profiling.steps import samples_of
from penstock.sim.recording import read_steps

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "slices"
PRESETS: dict[str, dict[str, float]] = {
    "sls": {"batch_size": 4},
    "ils": {"parallel": 4},
    "scls": {"slice_tokens": 32, "interval": 0.25},
    "past-future": {},
}
LOAD = ("--lengths", "sharegpt", "--scale", "0.125", "--cap", "160")
KV_TOKENS = 16_384
COUNT = 400
OTHER = ("--requests", "80", "--seed", "99", "--rate")


def serving(preset: str, *more: str) -> list[str]:
    """What to write after ``penstock serve``."""
    words = [
        str(model.build(model.M32)),
        "--instances", "2", "--threads", "1", "--preset", preset,
        "--kv-tokens", str(KV_TOKENS), "--dtype", "float32", "--no-prefix-cache",
        "--max-waiting", "0", "--max-waiting-tokens", "0", "--trace-lengths",
    ]  # fmt: skip
    for name, value in PRESETS[preset].items():
        words += [f"--parameters.{name}", f"{value:g}"]
    return [*words, *more]


class Live(NamedTuple):
    """A live run: what ``penstock bench`` says of it, and the steps of both instances."""

    numbers: dict[str, float]
    steps: list[Sample]


def drive(preset: str, words: tuple[str, ...]) -> Live:
    """Serve a load live."""
    with tempfile.TemporaryDirectory() as folder:
        out, steps = Path(folder) / "bench.json", Path(folder) / "steps.jsonl"
        with serve(serving(preset, "--record-steps", str(steps))) as url:
            wait_for_both(url)
            penstock("bench", "--url", url, *LOAD, *words, "--json", str(out))
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        parts = [samples_of(read_steps(Path(f"{steps}.{number}"))) for number in (0, 1)]
    busy = [sum(sample.seconds for sample in part) for part in parts]
    return Live({**numbers(found), "busiest": max(busy) / sum(busy)}, [*parts[0], *parts[1]])


def paced(profile: Path, steps: list[Sample]) -> float:
    """How many times as long as a profile says these steps took; the profile is made to say so."""
    said = profiles.find(str(profile))
    model = said.model()
    pace = sum(step.seconds for step in steps) / sum(model.seconds(step.load) for step in steps)
    times = {k: v if k == "rows" else v * pace for k, v in said.coefficients.items()}
    msgspec.structs.replace(said, coefficients=times).save(profile)
    return pace


def predict(preset: str, profile: Path, words: tuple[str, ...]) -> dict[str, float]:
    """The same load, simulated."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "simulate.json"
        more = [
            word
            for name, value in PRESETS[preset].items()
            for word in (f"--parameters.{name}", f"{value:g}")
        ]
        place = [] if preset == "scls" else ["--place", "least-outstanding"]
        penstock(
            "simulate", *LOAD, *words, *place, *more, "--preset", preset, "--instances", "2",
            "--profile", str(profile), "--kv-tokens", str(KV_TOKENS), "--block-size", "16",
            "--max-batch", "64", "--prefill-budget", "512", "--json", str(out),
        )  # fmt: skip
        (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    busy = run["cluster"]["busy_s"]
    return {**numbers(run), "busiest": max(busy) / sum(busy)}


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """What is compared, of a run of either command; seconds, and tokens per second."""
    summary = found.get("summary", found)
    times = summary["percentiles"] if "percentiles" in summary else summary["latency"]
    e2e = times["e2e"]
    throughput = summary["throughput_output_tps"]
    return {"mean": e2e["mean"], "p50": e2e["p50"], "p90": e2e["p90"], "throughput": throughput}


def calibrate() -> str:
    """Requests per second, for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        steps, profile = Path(folder) / "steps.jsonl", Path(folder) / "profile.json"
        record(steps, serving("past-future"), (*LOAD, *OTHER, "5"))
        fit(steps, profile)
        for rate in (half / 2 for half in range(2, 120)):
            words = ("--requests", str(COUNT), "--rate", str(rate), "--seed", "0")
            done = {
                preset: predict(preset, profile, words)["throughput"]
                for preset in ("sls", "past-future")
            }
            if done["sls"] < 0.95 * done["past-future"]:
                return str(rate)
    msg = "sls keeps up at 60 requests a second: this study is too light for this machine"
    raise SystemExit(msg)


def one_trial(seed: int, rate: str) -> dict[str, dict[str, dict[str, float]]]:
    """Every preset once, live and simulated, between two recordings of steps."""
    words = ("--requests", str(COUNT), "--rate", rate, "--seed", str(seed))
    with tempfile.TemporaryDirectory() as folder:
        steps, profile = Path(folder) / "steps.jsonl", Path(folder) / "profile.json"
        record(steps, serving("past-future"), (*LOAD, *OTHER, rate))
        # Whoever comes first or last would always meet the same moods of the machine.
        turns = [list(PRESETS)[(seed + place) % len(PRESETS)] for place in range(len(PRESETS))]
        live = {preset: drive(preset, words) for preset in turns}
        # Whose steps hold many prompts at once, as those of static batches do.
        record(steps, serving("scls"), (*LOAD, *OTHER, rate))
        rows = {}
        for preset in PRESETS:
            fit(steps, profile)
            pace = paced(profile, live[preset].steps)
            simulated = {**predict(preset, profile, words), "pace": pace}
            rows[preset] = {"live": {**live[preset].numbers, "pace": 1.0}, "simulated": simulated}
        return rows


def main() -> None:
    """Measure, predict, and write both down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=3)
    arguments = parser.parse_args()
    rate = calibrate()
    print(f"{rate} requests per second", file=sys.stderr, flush=True)
    trials = [one_trial(seed, rate) for seed in range(arguments.trials)]
    rows = {
        preset: {
            side: {
                key: statistics.median(trial[preset][side][key] for trial in trials)
                for key in trials[0][preset][side]
            }
            for side in ("live", "simulated")
        }
        for preset in PRESETS
    }
    for preset, row in rows.items():
        cells = (
            f"{key} {row['live'][key]:.3f} ({row['simulated'][key] / row['live'][key] - 1:+.1%})"
            for key in row["live"]
        )
        print(f"{preset}: " + ", ".join(cells))
    for side in ("live", "simulated"):
        print(side, sorted(rows, key=lambda preset: rows[preset][side]["mean"]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {
        "command": f"python benchmarks/slices/live.py --trials {arguments.trials}",
        "commit": revision(ROOT),
        "machine": machine(),
        "rate": float(rate),
        "medians": rows,
        "trials": trials,
    }
    (RESULTS / "live.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
