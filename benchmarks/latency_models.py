"""How far each latency model is off on steps it was not fitted to.

For each pair of model and GPU in the tables of NVIDIA's aiconfigurator 0.12.0 (Apache-2.0), a model
sees every other batch size and every other length of decode steps (up to 64 requests, where the
table is a whole grid), and every other prompt and mixed step.  Held out is the rest.  Static
batches and look-up tables know nothing of mixed steps and are not asked about them.

Interpolation of layer tables is tried on the attention table of casys-kaist/LLMServingSim (MIT):
chunks and contexts that are powers of two are known, the others are held out.

Run: ``python benchmarks/latency_models.py FOLDER_OF_TABLES [--json FILE]``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from penstock.bench.local import revision
from penstock.bench.result import machine
from penstock.core.forecast.latency.affine import Affine
from penstock.core.forecast.latency.base import LatencyModel, StepLoad
from penstock.core.forecast.latency.bilinear import Bilinear
from penstock.core.forecast.latency.fit import Sample, fit_affine, fit_roofline, mape
from penstock.core.forecast.latency.lookup import LookUpTable
from penstock.core.forecast.latency.online import OnlineAffine
from penstock.sim.layer_table import Attention, read_layer_table

ROOT = Path(__file__).resolve().parents[1]
GRID_BATCH = 64
PASSES = 10  # over the known steps, for the model that is fitted on line
LAYERS = "llmservingsim_RTXPRO6000_llama3.1-8b_tp1"
Steps = dict[str, list[Sample]]
Row = dict[str, str]


def table(folder: Path, name: str, pair: tuple[str, ...]) -> list[Row]:
    """The rows of one pair."""
    with (folder / f"aiconfigurator_{name}.csv").open() as lines:
        return [r for r in csv.DictReader(lines) if (r["model"], r["system"], r["tp"]) == pair]


def pairs(folder: Path) -> list[tuple[str, ...]]:
    """Model, GPU and tensor parallel degree."""
    with (folder / "aiconfigurator_decode_step.csv").open() as lines:
        return sorted({(r["model"], r["system"], r["tp"]) for r in csv.DictReader(lines)})


def decode(rows: Iterable[Row]) -> tuple[list[Sample], list[Sample]]:
    """Known and held-out decode steps."""
    grid = [r for r in rows if int(r["batch"]) <= GRID_BATCH]
    batches = sorted({int(r["batch"]) for r in grid})[::2]
    lengths = sorted({int(r["context_per_seq"]) for r in grid})[::2]
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for row in grid:
        batch, each = int(row["batch"]), int(row["context_per_seq"])
        load = StepLoad(batch, batch * each, longest=each)
        known = batch in batches and each in lengths
        sides[not known].append(Sample(load, float(row["decode_step_ms"]) / 1000))
    return sides


def prompts(rows: Sequence[Row]) -> tuple[list[Sample], list[Sample]]:
    """Known and held-out steps of prompts alone."""
    found = []
    for row in rows:
        batch, new, cached = (int(row[k]) for k in ("batch", "new_tokens", "cached_prefix_tokens"))
        load = StepLoad(0, 0, batch * new, batch * new * (cached + new / 2), batch)
        found.append(Sample(load, float(row["prefill_ms"]) / 1000))
    return found[::2], found[1::2]


def mixed(rows: Sequence[Row]) -> tuple[list[Sample], list[Sample]]:
    """Known and held-out mixed steps; their prompts are half done on average."""
    found = []
    for row in rows:
        prefill, decoding = int(row["prefill_tokens_in_step"]), int(row["decode_seqs_in_step"])
        each = int(row["isl_per_seq"])
        load = StepLoad(decoding, decoding * each, prefill, prefill * each / 2, 1, each)
        if prefill and decoding:
            found.append(Sample(load, float(row["step_ms"]) / 1000))
    return found[::2], found[1::2]


def online(known: Steps) -> OnlineAffine:
    """The known steps as they would come in, in no order."""
    model = OnlineAffine(Affine(0.01, 0.0, 0.0, 0.0, 0.0))
    steps = [step for side in known.values() for step in side] * PASSES
    random.Random(0).shuffle(steps)
    for step in steps:
        model.observe(*step)
    return model


def bilinear(known: Steps) -> Bilinear:
    """SCLS's forms over batch size and length."""
    return Bilinear.fit(
        [(s.load.chunks, s.load.prefill // s.load.chunks, s.seconds) for s in known["prompts"]],
        [(s.load.decoding, s.load.longest, s.seconds) for s in known["decode"]],
    )


def look_up(known: Steps) -> LookUpTable:
    """Kairos's table over the known grid, and the mean prompt rate."""
    cells = {(s.load.decoding, s.load.longest): s.seconds for s in known["decode"]}
    tokens = sum(s.load.prefill for s in known["prompts"])
    return LookUpTable(cells, tokens / sum(s.seconds for s in known["prompts"]))


def everything(known: Steps) -> list[Sample]:
    """All known steps."""
    return [step for side in known.values() for step in side]


MODELS: dict[str, tuple[Callable[[Steps], LatencyModel], tuple[str, ...]]] = {
    "Affine": (lambda known: fit_affine(everything(known)), ("decode", "prompts", "mixed")),
    "Roofline": (lambda known: fit_roofline(everything(known)), ("decode", "prompts", "mixed")),
    "OnlineAffine": (online, ("decode", "prompts", "mixed")),
    "Bilinear": (bilinear, ("decode", "prompts")),
    "LookUpTable": (look_up, ("decode", "prompts")),
}


def compare(folder: Path, pair: tuple[str, ...]) -> list[dict[str, object]]:
    """Each model's mean relative errors on what it has not seen."""
    sides = {
        "decode": decode(table(folder, "decode_step", pair)),
        "prompts": prompts(table(folder, "prefill", pair)),
        "mixed": mixed(table(folder, "mixed_step", pair)),
    }
    known = {kind: side[0] for kind, side in sides.items()}
    found: list[dict[str, object]] = []
    for name, (make, kinds) in MODELS.items():
        model = make(known)
        row: dict[str, object] = {"pair": " ".join(pair), "model": name}
        row |= {kind: round(mape(model, sides[kind][1]), 4) for kind in kinds}
        found.append(row)
    return found


def power(text: str) -> bool:
    """Whether it is 0 or a power of two."""
    number = int(text)
    return number & (number - 1) == 0


def layers(folder: Path) -> dict[str, object]:
    """Mean relative errors of attention between the table's points."""
    with gzip.open(folder / f"{LAYERS}_attention.csv.gz", "rt") as lines:
        head, *rows = list(csv.reader(lines))
    known = [row for row in rows if all(map(power, row[:4]))]
    held = [row for row in rows if not all(map(power, row[:4]))]
    with TemporaryDirectory() as place:
        for part in ("dense", "per_sequence"):
            copy = (folder / f"{LAYERS}_{part}.csv.gz").read_bytes()
            (Path(place) / f"x_{part}.csv.gz").write_bytes(copy)
        text = "\n".join(",".join(row) for row in (head, *known))
        (Path(place) / "x_attention.csv").write_text(text)
        attention = read_layer_table(f"{place}/x", 32).attention
    off: dict[str, list[float]] = {"decode": [], "prompts": [], "mixed": [], "sum of parts": []}
    for row in held:
        chunk, context, requests, mean, seconds = map(float, row)
        kind = "mixed" if chunk and requests else "decode" if requests else "prompts"
        guess = interpolated(attention, chunk, context, requests, mean)
        off[kind].append(abs(guess / seconds - 1))
        if kind == "mixed":
            parts = attention.chunk(chunk, context) + attention.decoding(requests, mean)
            off["sum of parts"].append(abs(parts / seconds - 1))
    means = {kind: round(sum(values) / len(values), 4) for kind, values in off.items()}
    return {"known": len(known), "held_out": len(held), **means}


def interpolated(
    attention: Attention, chunk: float, context: float, requests: float, mean: float
) -> float:
    """Microseconds, by the table's own rules."""
    if chunk and requests:
        return attention.mixed_step(chunk, context, requests, mean)
    return attention.decoding(requests, mean) if requests else attention.chunk(chunk, context)


def main() -> None:
    """Compare all models on all pairs, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for pair in pairs(arguments.folder) for row in compare(arguments.folder, pair)]
    means: dict[str, dict[str, float]] = {}
    for name, (_, kinds) in MODELS.items():
        mine = [row for row in rows if row["model"] == name]
        means[name] = {k: round(sum(float(str(r[k])) for r in mine) / len(mine), 4) for k in kinds}
        print(name, means[name])
    interpolation = layers(arguments.folder)
    print("LayerTable (attention)", interpolation)
    if arguments.json:
        report = {
            "commit": revision(ROOT), "machine": machine(), "command": " ".join(sys.argv),
            "means": means, "layer_table_attention": interpolation, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
