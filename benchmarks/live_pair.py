"""What live studies of two instances have in common: starting, waiting, recording step times."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from penstock.bench.local import serve

_SECONDS = 90


def penstock(*words: str) -> None:
    """Run a command; its own words show if it fails.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "penstock.cli", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def wait_for_both(url: str) -> None:
    """Until both instances say something of themselves."""
    for _ in range(10 * _SECONDS):
        text = httpx.get(f"{url}/metrics").text
        if all(f'requests_running{{instance="{number}"' in text for number in (0, 1)):
            return
        time.sleep(0.1)
    msg = f"an instance did not come up within {_SECONDS} seconds"
    raise SystemExit(msg)


def record(steps: Path, serving: Sequence[str], load: Sequence[str]) -> None:
    """Steps of two live instances under a load, into a file for each.

    What a step takes depends on all else that the machine does, the front and the clients among it.

    Args:
        steps: the files' stem; what they hold is added to.
        serving: what to write after ``penstock serve``.
        load: what to write after ``penstock bench``.
    """
    with serve([*serving, "--record-steps", str(steps)]) as url:
        wait_for_both(url)
        penstock("bench", *load, "--url", url)


def fit(steps: Path, profile: Path) -> None:
    """Make a profile of what :func:`record` left."""
    files = [word for number in (0, 1) for word in ("--steps", f"{steps}.{number}")]
    penstock("profile", str(profile), *files)
