"""Where commands write their numbers: a file, or standard output."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from penstock.bench.writable import check_writable

STDOUT = "-"


def check_targets(**targets: str | Path | None) -> None:
    """Refuse what cannot be written, before the work that would fill it.

    Args:
        targets: by option; None and ``-`` need no file.

    Raises:
        OutputError: one cannot be written.
    """
    for option, target in targets.items():
        if target is not None and target != STDOUT:
            check_writable(option.replace("_", "-"), Path(target))


def write_json(data: object, target: str) -> None:
    """Write data, indented, to a file or to standard output (``-``).

    Raises:
        OSError: it cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n"
    if target == STDOUT:
        sys.stdout.write(text.decode())
    else:
        Path(target).write_bytes(text)
