"""Which request of a workload could never be served, and by what cell it shows."""

from __future__ import annotations

import numpy as np

from penstock.bench.workload import Workload


def misfit(workload: Workload, room: int, cap: int | None, *, enforce_cap: bool) -> str | None:
    """Name the first request that can never fit, by file, row and column; None if all fit.

    Args:
        workload: with output lengths.
        room: KV memory for one request, in tokens.
        cap: what policies are told of outputs; None is the longest.
        enforce_cap: outputs are cut there.
    """
    assert workload.output is not None
    prompt = workload.prompt
    told = int(workload.output.max()) if cap is None else cap
    produced = np.minimum(workload.output, told) if enforce_cap else workload.output
    never = f"can never fit kv_tokens ({room})"
    alone = prompt > room
    if alone.any():
        index = int(alone.argmax())
        return f"{_cell(workload, index, 'prompt')} is {prompt[index]}; it {never}"
    # The last token's KV is never computed.
    own = prompt + produced - 1 > room
    if own.any():
        index = int(own.argmax())
        what = f"with its prompt of {prompt[index]} tokens it {never}"
        return f"{_cell(workload, index, 'output')} is {produced[index]}; {what}"
    reserved = prompt + told - 1 > room
    if reserved.any():
        index = int(reserved.argmax())
        what = f"a cap of {told} tokens" + (" (the longest output)" if cap is None else "")
        why = f"with {what} it {never}; lower the cap or raise kv_tokens"
        return f"{_cell(workload, index, 'prompt')} is {prompt[index]}; {why}"
    return None


def too_short(workload: Workload) -> str | None:
    """Name the first length below 1, by file, row and column; None if there is none."""
    for side, lengths in (("prompt", workload.prompt), ("output", workload.output)):
        assert lengths is not None
        below = lengths < 1
        if below.any():
            index = int(below.argmax())
            cell = _cell(workload, index, side)
            return f"{cell} is {lengths[index]}; it must be at least 1"
    return None


def _cell(workload: Workload, index: int, side: str) -> str:
    origin = workload.origin
    if origin is None:
        return f"{workload.source}: request {index} (counted from 0), {side} tokens"
    return origin.cell(index, origin.prompt if side == "prompt" else origin.output)
