"""Which implementation of the kernels this process uses; decided once, at first use."""

from __future__ import annotations

import functools
import logging
import os

from penstock.engine.kernels.build import BuildError, library
from penstock.engine.kernels.native import Native

_log = logging.getLogger(__name__)


@functools.cache
def compiled() -> Native | None:
    """The compiled kernels, or None where PyTorch does the work; compiles them if need be.

    Raises:
        ValueError: ``PENSTOCK_KERNELS`` is neither ``native`` nor ``torch``.
        BuildError, OSError: it is ``native`` and the kernels cannot be built or loaded.
    """
    choice = os.environ.get("PENSTOCK_KERNELS", "")
    if choice not in ("", "torch", "native"):
        msg = f"PENSTOCK_KERNELS is {choice!r}; it must be 'native' or 'torch', or unset"
        raise ValueError(msg)
    if choice == "torch":
        return None
    try:
        return Native(library())
    except (BuildError, OSError) as error:
        if choice == "native":
            raise
        _log.warning("attention runs in plain PyTorch, which is slower: %s", error)
        return None
