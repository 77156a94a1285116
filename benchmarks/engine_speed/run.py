"""Output tokens per second of the native engine, of transformers and of vLLM, on this CPU.

    python benchmarks/engine_speed/run.py [--vllm-python PATH]

Random-weight Llama models of 30M and 100M parameters; 1, 16 and 64 requests at once; the same
prompts (32 to 256 tokens) and exact output lengths (64 to 128) for every side.  A trial
times one side from the first submission to the last token, prefill included; the sides
take turns, so that whatever else disturbs the machine disturbs them alike.  Each runs in a
process of its own, with the Python given for it.  Writes JSON and Markdown next to the
other results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report
from workload import CONTEXT, MODELS, Requests, requests

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
CONCURRENCY = (1, 16, 64)


class Side:
    """A process that has a model loaded and times requests when told to."""

    def __init__(self, name: str, python: str, folder: Path, dtype: str, threads: int) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(HERE.parents[1] / "src") if name == "penstock" else ""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [python, str(HERE / f"side_{name}.py"), str(folder), dtype, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def run(self, batch: Requests) -> dict[str, Any]:
        """Serve these requests; returns seconds and tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self._log.read()[-3000:]}")
        message: dict[str, Any] = json.loads(line)
        return message


def main() -> None:
    """Measure everything and write it down."""
    options = parse()
    threads = options.threads or len(os.sched_getaffinity(0))
    pythons = {"penstock": sys.executable, "transformers": sys.executable}
    if options.vllm_python:
        pythons["vllm"] = options.vllm_python
    outcome: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": output("git", "-C", str(HERE), "describe", "--always", "--dirty"),
        "machine": machine(threads),
        "dtype": options.dtype,
        "versions": {},
        "trials": [],
    }
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder))
            sides = []
            for name, python in pythons.items():
                sides.append(Side(name, python, Path(folder), options.dtype, threads))
                outcome["versions"][name] = sides[-1].versions
            try:
                for concurrency in CONCURRENCY:
                    outcome["trials"] += measure(sides, model, concurrency, options.trials)
                    write(outcome)  # a run is long: nothing measured shall be lost
            finally:
                for side in sides:
                    side.close()
    print(report.markdown(outcome))


def write(outcome: dict[str, Any]) -> None:
    """Store what has been measured so far."""
    outcome["load_average_at_end"] = os.getloadavg()[2]
    RESULTS.mkdir(exist_ok=True)
    # Results on the two kinds of CPU stand side by side: their matrix rates differ by eight.
    amx = "_amx" if "amx_bf16" in outcome["machine"].get("Flags", "").split() else ""
    stem = RESULTS / f"engine_speed_{outcome['dtype']}{amx}"
    stem.with_suffix(".json").write_text(json.dumps(outcome, indent=1) + "\n")
    stem.with_suffix(".md").write_text(report.markdown(outcome))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", help="interpreter that has vLLM's CPU build")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--trials", type=int, default=3, help="per side and setting")
    parser.add_argument("--threads", type=int, help="default: the CPUs this process may use")
    return parser.parse_args()


def save_model(name: str, folder: Path) -> None:
    """Write a random model as a checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(sides: list[Side], model: str, concurrency: int, trials: int) -> list[dict[str, Any]]:
    """Trials of every side in turn, after one that is not counted."""
    found = []
    for trial in range(-1, trials):
        # A single request is over too soon to time well: several, one after the other.
        rounds = 4 if concurrency == 1 else 1
        batches = [requests(model, concurrency, trial * rounds + i) for i in range(rounds)]
        for side in sides:
            results = [side.run(batch) for batch in batches]
            seconds = sum(result["seconds"] for result in results)
            tokens = sum(result["tokens"] for result in results)
            if trial >= 0:
                found.append(
                    {
                        "model": model,
                        "concurrency": concurrency,
                        "side": side.name,
                        "trial": trial,
                        "seconds": round(seconds, 4),
                        "tokens": tokens,
                        "tokens_per_second": round(tokens / seconds, 2),
                    }
                )
                print(found[-1], file=sys.stderr, flush=True)
            time.sleep(0.2)
    return found


def machine(threads: int) -> dict[str, Any]:
    """What this ran on."""
    lscpu = json.loads(output("lscpu", "-J") or '{"lscpu": []}')["lscpu"]
    wanted = ("Model name:", "CPU(s):", "L2 cache:", "L3 cache:", "Flags:")
    found = {
        entry["field"].rstrip(":"): entry["data"] for entry in lscpu if entry["field"] in wanted
    }
    return found | {
        "threads": threads,
        "kernel": platform.release(),
        "python": sys.version.split()[0],
    }


def output(*command: str) -> str:
    """A command's output, or nothing if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    main()
