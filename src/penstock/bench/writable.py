"""Whether a file can be written, found out before a long run."""

from __future__ import annotations

from pathlib import Path


class OutputError(ValueError):
    """A file that cannot be written."""


def check_writable(name: str, path: Path) -> None:
    """Find out before a long run whether its file can be written; what it holds stays.

    Args:
        name: the option that named it.
        path: the file.

    Raises:
        OutputError: it cannot be.
    """
    try:
        # Through a link to nowhere: what is made here is taken away again, not the link.
        real = path.resolve()
        exists = real.exists()
        # To open a pipe and close it again would tell its reader that nothing more comes.
        if exists and not real.is_file() and not real.is_dir():
            return
        with real.open("ab"):
            pass
        if not exists:
            real.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise refusal(name, path, error) from None


def refusal(name: str, path: Path, error: Exception) -> OutputError:
    """What to say of a file that could not be written."""
    why = error.strerror if isinstance(error, OSError) else error
    return OutputError(f"{name} is {str(path)!r}; it must be a file that can be written ({why})")
