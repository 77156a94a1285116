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
    """Steps of one engine, beside another one that works as much.

    Args:
        steps: the file that they are added to.
        serving: what to write after ``penstock serve``, for each of the two.
        load: what to write after ``penstock bench``, for each of them.

    Raises:
        CalledProcessError: a client failed.
    """
    command = [sys.executable, "-m", "penstock.cli", "bench", *load, "--url"]
    with serve([*serving, "--record-steps", str(steps)]) as one, serve([*serving]) as other:
        both = [
            subprocess.Popen([*command, url], stdout=subprocess.DEVNULL) for url in (one, other)
        ]
        for process in both:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)
