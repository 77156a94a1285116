"""One live prefill and one live decode instance, and the simulator's prediction for them.

    python benchmarks/kairos/live.py [--trials N]

A random Llama of 14 million parameters, one CPU thread per instance, serves prompts with a long
tail (lognormal, median 120 tokens, at most 1,800) from ``penstock bench`` in an open loop; outputs
end at their true lengths by the server's test hook, which no policy sees.  ``penstock simulate
--prefill 1 --decode 1`` then replays the same requests with step times that were recorded under
another load on two single instances side by side.  Compared are the attainments of TTFT, TPOT and
both, and the ranking of the presets.

Expected, written before it was measured: the same ranking end to end; attainments within 5 points
where the machine is quiet, TPOT worse than TTFT, since the front and the hand-offs take CPU from
the decode instance and the simulator knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "past_future_live"))

import model
from live_pair import penstock, record, wait_for_both

from penstock.bench.local import revision, serve
from penstock.bench.result import machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kairos"
PRESETS = ("distserve", "kairos-literal", "kairos")
LOAD = ("--input", "lognormal:120,1.2,1800", "--output", "lognormal:24,0.6,96", "--cap", "96")
SLO = ("--slo", "ttft=1.5,tpot=0.03")
KV_TOKENS, CHUNK, COUNT = 65_536, 512, 240
OTHER = ("--requests", "60", "--rate", "2", "--seed", "99")


def serving(preset: str, *more: str) -> list[str]:
    """What to write after ``penstock serve``."""
    return [
        str(model.build(Path(tempfile.gettempdir()) / f"penstock-{model.NAME}")),
        "--threads", "1", "--preset", preset, "--kv-tokens", str(KV_TOKENS),
        "--max-step-tokens", str(CHUNK), "--dtype", "float32", "--no-prefix-cache",
        "--max-waiting", "0", "--max-waiting-tokens", "0", "--trace-lengths", *more,
    ]  # fmt: skip


def attained(found: dict[str, Any]) -> dict[str, float]:
    """Of a run of either command, in percent."""
    (part,) = found.get("summary", found)["classes"].values()
    broken = {name: part["broken"].get(name, 0) / part["attempts"] for name in ("ttft", "tpot")}
    kept = {name: 100 * (1 - share) for name, share in broken.items()}
    return {**kept, "both": 100 * part["attainment"]}


def drive(preset: str, words: tuple[str, ...]) -> dict[str, float]:
    """Serve the load live."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        roles = ("--prefill", "1", "--decode", "1")
        with serve(serving(preset, *roles)) as url:
            wait_for_both(url)
            penstock("bench", "--url", url, *LOAD, *SLO, *words, "--json", str(out))
        return attained(json.loads(out.read_text(encoding="utf-8")))


def predict(preset: str, profile: Path, words: tuple[str, ...]) -> dict[str, float]:
    """The same load, simulated; KV crosses by shared memory, at about 1 GB/s all in all."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "simulate.json"
        kv_bytes = 2 * model.LAYERS * model.KV_HEADS * model.HEAD_DIM * 4
        penstock(
            "simulate", *LOAD, *SLO, *words, "--preset", preset, "--prefill", "1", "--decode", "1",
            "--profile", str(profile), "--kv-tokens", str(KV_TOKENS), "--block-size", "16",
            "--max-batch", "64", "--prefill-budget", str(CHUNK), "--link-bandwidth", "1",
            "--link-latency", "0.005", "--kv-bytes-per-token", str(kv_bytes),
            *(("--back-pressure", "1") if preset == "kairos" else ()), "--json", str(out),
        )  # fmt: skip
        (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
        return attained(run)


def one_trial(seed: int, rate: float) -> dict[str, dict[str, dict[str, float]]]:
    """Every preset once, live and simulated, between two recordings of steps."""
    words = ("--requests", str(COUNT), "--rate", f"{rate:g}", "--seed", str(seed))
    with tempfile.TemporaryDirectory() as folder:
        steps, profile = Path(folder) / "steps.jsonl", Path(folder) / "profile.json"
        record(steps, serving("vllm"), (*LOAD, *OTHER))
        live = {preset: drive(preset, words) for preset in PRESETS}
        record(steps, serving("vllm"), (*LOAD, *OTHER))
        penstock("profile", str(profile), "--steps", str(steps))
        return {
            preset: {"live": found, "simulated": predict(preset, profile, words)}
            for preset, found in live.items()
        }


def main() -> None:
    """Measure, predict, and write both down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3.0)
    arguments = parser.parse_args()
    trials = [one_trial(seed, arguments.rate) for seed in range(arguments.trials)]
    rows = {
        preset: {
            side: {
                key: statistics.mean(trial[preset][side][key] for trial in trials)
                for key in ("ttft", "tpot", "both")
            }
            for side in ("live", "simulated")
        }
        for preset in PRESETS
    }
    for preset, row in rows.items():
        cells = (
            f"{key} {row['live'][key]:.1f} ({row['simulated'][key]:.1f})" for key in row["live"]
        )
        print(f"{preset}: live (simulated) " + ", ".join(cells))
    for side in ("live", "simulated"):
        print(side, sorted(rows, key=lambda preset: -rows[preset][side]["both"]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {
        "command": f"python benchmarks/kairos/live.py --rate {arguments.rate:g}",
        "commit": revision(ROOT),
        "machine": machine(),
        "means": rows,
        "trials": trials,
    }
    (RESULTS / "live.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
