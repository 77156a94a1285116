"""Fit the step-time profiles that ship with Penstock to public step-time tables.

    python tools/fit_profiles/fit_profiles.py FOLDER_OF_TABLES

The folder holds step times computed with NVIDIA's aiconfigurator 0.12.0 (Apache-2.0), as
``aiconfigurator_{decode_step,prefill,mixed_step}.csv``.  Only coefficients, source and error are
written, to ``src/penstock/sim/profiles``.  Every fifth row of each table is held out of the fit;
the error is the mean absolute relative error on those.

Llama-2 is in none of the tables: its profiles are derived from the fit of a Llama-3.1 model on the
same GPU, by the ratio of what each term reads or computes.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from penstock.core.forecast.latency.base import StepLoad
from penstock.core.forecast.latency.fit import Sample, fit_roofline
from penstock.core.forecast.latency.roofline import Roofline

TARGET = Path(__file__).resolve().parents[2] / "src" / "penstock" / "sim" / "profiles"
HOST = 0.00113
HOST_NOTE = (
    "host is 1.13 ms per step, what vLLM 0.19.0 took beyond its kernels in a measured run of "
    "Llama-3.1-8B (casys-kaist/LLMServingSim, MIT; docs/latency.md); calibrate it for your server"
)
CHECKED = {
    "llama-2-7b/a100-80g": "nothing measured was found to compare it with",
    "llama-2-13b/a100-80g": "compared with what DistServe measured for OPT-13B on the same GPU "
    "(Apache-2.0): decode steps of 1 to 64 requests with 1,024 tokens 11 % less to 8 % more, "
    "prompts of 512 to 2,048 tokens 13 to 16 % less",
    "llama-2-70b/a100-80g-x4": "compared with what Splitwise measured with the software of 2023 "
    "(splitwise-sim, MIT): there decode steps of 1 to 32 requests took 42 to 52 ms, here 30 to 31; "
    "prompts of 512 to 2,048 tokens took 127 to 403 ms, here 97 to 335",
}
SOURCE = "step times computed with NVIDIA aiconfigurator 0.12.0 (Apache-2.0), vLLM backend"
EVERY = 5


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a model: parameters read per step, and attention's sizes."""

    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """KV bytes per token, two per number."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def attention(self) -> int:
        """What a unit of prompt attention is proportional to."""
        return self.layers * self.hidden


# Parameters without the input embedding, of which a step reads a few rows only.
LLAMA_31_8B = Shape(8.03e9 - 128_256 * 4096, 32, 4096, 8)
LLAMA_31_70B = Shape(70.55e9 - 128_256 * 8192, 80, 8192, 8)
LLAMA_2_7B = Shape(6.738e9 - 32_000 * 4096, 32, 4096, 32)
LLAMA_2_13B = Shape(13.016e9 - 32_000 * 5120, 40, 5120, 40)
LLAMA_2_70B = Shape(68.977e9 - 32_000 * 8192, 80, 8192, 8)


def rows(folder: Path, model: str, system: str, tp: str) -> list[tuple[StepLoad, float, bool]]:
    """Loads, seconds, and whether they are held out."""
    found: list[tuple[StepLoad, float, bool]] = []

    def add(load: StepLoad, milliseconds: str, index: int) -> None:
        found.append((load, float(milliseconds) / 1000, index % EVERY == EVERY - 1))

    def table(name: str) -> list[dict[str, str]]:
        with (folder / f"aiconfigurator_{name}.csv").open() as lines:
            wanted = (model, system, tp)
            keys = ("model", "system", "tp")
            return [r for r in csv.DictReader(lines) if tuple(r[k] for k in keys) == wanted]

    for i, row in enumerate(table("decode_step")):
        load = StepLoad(int(row["batch"]), int(row["total_context"]))
        add(load, row["decode_step_ms"], i)
    for i, row in enumerate(table("prefill")):
        batch, new, cached = (int(row[k]) for k in ("batch", "new_tokens", "cached_prefix_tokens"))
        work = batch * new * (cached + new / 2)
        add(StepLoad(0, 0, batch * new, work, batch), row["prefill_ms"], i)
    for i, row in enumerate(table("mixed_step")):
        prefill, decoding = int(row["prefill_tokens_in_step"]), int(row["decode_seqs_in_step"])
        each = int(row["isl_per_seq"])
        # The prompt tokens of a mixed step belong to prompts of that length, half done on average.
        load = StepLoad(decoding, decoding * each, prefill, prefill * each / 2, 1)
        add(load, row["step_ms"], i)
    return found


def errors(model: Roofline, data: list[tuple[StepLoad, float, bool]]) -> dict[str, float | int]:
    """On the held-out rows, without host time, of which the tables have none."""
    relative = [abs(model.seconds(load) / s - 1) for load, s, held in data if held]
    return {
        "fitted_points": sum(not held for _, _, held in data),
        "held_out_points": len(relative),
        "held_out_mape": round(float(np.mean(relative)), 4),
        "held_out_p95": round(float(np.quantile(relative, 0.95)), 4),
    }


def derived(model: Roofline, of: Shape, to: Shape) -> Roofline:
    """Scale each term by what it reads or computes."""
    linear = to.parameters / of.parameters
    return Roofline(
        host=0.0,
        weights=model.weights * linear,
        base=model.base * linear,
        token=model.token * linear,
        request=model.request,
        context=model.context * to.kv_bytes / of.kv_bytes,
        work=model.work * to.attention / of.attention,
    )


def write(name: str, title: str, model: Roofline, facts: dict[str, object]) -> None:
    """One profile as a JSON file."""
    coefficients = {k: float(f"{v:.5g}") for k, v in asdict(replace(model, host=HOST)).items()}
    data = {"name": name, "title": title, "kind": "roofline", "coefficients": coefficients}
    notes = [HOST_NOTE]
    if name in CHECKED:
        notes.insert(0, f"derived, not measured; {CHECKED[name]}")
    path = TARGET / f"{name.replace('/', '--')}.json"
    path.write_text(json.dumps({**data, **facts, "note": "; ".join(notes)}, indent=1) + "\n")
    print(name, coefficients, facts.get("error"))


def main() -> None:
    """Fit and derive all."""
    folder = Path(sys.argv[1])
    pairs = [
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b", "Llama-3.1-8B", "1"),
        ("meta-llama/Meta-Llama-3.1-70B", "llama-3.1-70b", "Llama-3.1-70B", "4"),
        ("Qwen/Qwen3-32B", "qwen3-32b", "Qwen3-32B", "1"),
        ("Qwen/Qwen3-32B", "qwen3-32b", "Qwen3-32B", "2"),
    ]
    gpus = {
        "a100_sxm": ("a100-80g", "A100-80GB"),
        "h100_sxm": ("h100", "H100"),
        "h200_sxm": ("h200", "H200"),
    }
    fitted: dict[str, tuple[Roofline, dict[str, float | int]]] = {}
    for model, short, title, tp in pairs:
        for system, (gpu, gpu_title) in gpus.items():
            data = rows(folder, model, system, tp)
            if not data:
                continue
            name = f"{short}/{gpu}" + ("" if tp == "1" else f"-x{tp}")
            found = fit_roofline([Sample(load, s) for load, s, held in data if not held])
            error = errors(found, data)
            fitted[name] = (found, error)
            where = f"{title} on {gpu_title}" + ("" if tp == "1" else f", tensor parallel {tp}")
            write(name, where, found, {"source": SOURCE, "error": error})
    for name, title, base, of, to in (
        ("llama-2-7b/a100-80g", "Llama-2-7B on A100-80GB", "llama-3.1-8b/a100-80g",
         LLAMA_31_8B, LLAMA_2_7B),
        ("llama-2-13b/a100-80g", "Llama-2-13B on A100-80GB", "llama-3.1-8b/a100-80g",
         LLAMA_31_8B, LLAMA_2_13B),
        ("llama-2-70b/a100-80g-x4", "Llama-2-70B on A100-80GB, tensor parallel 4",
         "llama-3.1-70b/a100-80g-x4", LLAMA_31_70B, LLAMA_2_70B),
    ):  # fmt: skip
        found, error = fitted[base]
        facts = {
            "source": f"derived from {base} by the ratio of parameters read, KV bytes per token "
            f"and attention width; that: {SOURCE}",
            "error": {"of": base, **error},
        }
        write(name, title, derived(found, of, to), facts)


if __name__ == "__main__":
    main()
