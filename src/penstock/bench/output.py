"""Where the numbers of a measurement go: files, and the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from penstock.bench import html
from penstock.bench.result import Result, table
from penstock.bench.writable import OutputError, refusal


def report(result: Result, *, json: str | None, page: Path | None) -> None:
    """Write what was asked for, and print a table unless JSON goes to standard output.

    Args:
        result: the measurement.
        json: file for all numbers; ``-`` is standard output.
        page: file for the report with figures.

    Raises:
        OutputError: a file could not be written; everything else has been.
    """
    text = msgspec.json.format(msgspec.json.encode(result.to_dict()), indent=1)
    failed = []
    if page is not None:
        failed += _tried("html", page, lambda path: html.write(result, path))
    if json == "-":
        sys.stdout.write(text.decode() + "\n")
    else:
        if json is not None:
            failed += _tried("json", Path(json), lambda path: path.write_bytes(text + b"\n"))
        _print(result, None if failed else page)
    if failed:
        raise OutputError("; ".join(map(str, failed)))


def _tried(name: str, path: Path, write: Callable[[Path], object]) -> list[OutputError]:
    try:
        write(path)
    except OSError as error:
        return [refusal(name, path, error)]
    return []


def _print(result: Result, page: Path | None) -> None:
    from rich.console import Console

    console = Console()
    console.print(table(result))
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for error, count in result.summary.errors.items():
        console.print(f"error ({count} times): {error}", highlight=False, markup=False)
    if page is not None:
        console.print(f"report: {page}", highlight=False, markup=False)
