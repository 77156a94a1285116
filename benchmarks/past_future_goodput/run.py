"""Goodput against load, simulated: the 12 panels of the Past-Future paper's figure 7.

    python benchmarks/past_future_goodput/run.py

Llama-2-7B and 13B on an A100-80GB and 70B on four of them, KV memory for 120,000, 64,000 and
550,000 tokens; ShareGPT-o1 and three uniform distributions; a closed loop of clients with one
request each; a request is good if its TTFT is within 10 s and its largest gap within 1.5 s (70B:
15 s and 5 s).  What was not good goes back to the end of the list until it is, so wasted work
costs time; goodput is prompt and output tokens of good requests per second until all are done.
True output lengths are known to the engine and to the oracle alone; policies are told a cap:
12,000 for ShareGPT-o1, else the longest output, which is the mildest choice for ``tgi``.

What differs from the paper: step times are those of the profiles that ship with Penstock; prompts
are computed in chunks of at most 2,048 tokens a step, mixed with decoding; ShareGPT-o1 is drawn
from a fit of its quantiles.  As in the artifact's servers, a request without a first token after 8
s (70B: 10 s) is given up.  One whose gap is too large already goes on to its end under every
scheduler; the artifact ends it, except under its aggressive one.  ``past-future`` has the paper's
parameters and 1,000 ended requests behind it, as a server in use has.

Beside the paper's four curves there are, for what they show:

* ``past-future, cold``: with nothing behind it;
* ``past-future-artifact``: window 40, reserve 5 %, one admission every second step, cold as well;
* ``tgi, cap 12,000``: as the artifact has it on every load;
* ``past-future, late given up`` and ``vllm, late given up``: an evicted request is given up after
  1.49 s (70B: 4.9 s) without a token;
* ``past-future-adaptive``: with a reserve that is learned from evictions.

Cells are kept in ``cells.jsonl`` as they end, and an interrupted run goes on; ``--fresh`` starts
over, ``--main`` leaves the additional curves for later, ``--report`` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cells import Cell, cells, simulate
from report import figure, markdown, panels

from penstock.bench.local import revision
from penstock.bench.result import machine

ROOT = Path(__file__).resolve().parents[2]


def gather(todo: Sequence[Cell], book: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Run what is not in the book yet."""
    rows = {}
    if book.exists():
        kept = [json.loads(line) for line in book.read_text().splitlines()]
        rows = {row["key"]: row for row in kept}
    missing = [cell for cell in todo if cell.key not in rows]
    with ProcessPoolExecutor(jobs) as pool, book.open("a") as file:
        running = [pool.submit(simulate, cell) for cell in missing]
        for number, future in enumerate(as_completed(running), len(todo) - len(missing) + 1):
            row = future.result()
            rows[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            shown = f"goodput {row['goodput']:,.0f}, took {row['wall_s']:.1f} s"
            print(f"{number}/{len(todo)} {row['key']}: {shown}", flush=True)
    return rows


def main() -> None:
    """Run everything, and write tables, numbers and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="simulations at a time")
    parser.add_argument("--main", action="store_true", help="only the paper's four curves")
    parser.add_argument("--report", action="store_true", help="only of the cells that are done")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that are done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/past_future_goodput")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        (out / "cells.jsonl").unlink(missing_ok=True)
    todo = [] if arguments.report else list(cells(arguments.seeds, main=arguments.main))
    rows = gather(todo, out / "cells.jsonl", arguments.jobs)
    made = panels(rows, arguments.seeds)
    facts: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "seeds": arguments.seeds,
        "commit": revision(ROOT),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
    }
    data = {
        **facts,
        "largest_ratio": max(max(panel.ratios()) for panel in made),
        "panels": [{**asdict(panel), "ratios": panel.ratios()} for panel in made],
    }
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "results.md").write_text(markdown(made, facts))
    figure(made).savefig(out / "goodput.png", dpi=110)
    print(f"largest ratio {data['largest_ratio']:.2f}; see {out / 'results.md'}")


if __name__ == "__main__":
    main()
