"""How much KV memory to take where nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_SHARE = {"cpu": 0.4, "cuda": 0.85}
"""Of the memory that is free once the weights are loaded; the rest is for activations."""

_MEMINFO = "/proc/meminfo"
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def check_settings(block_size: int, threads: int | None, memory_share: float) -> None:
    """Refuse what no engine could be made with, before a model is loaded.

    Raises:
        ValueError: a setting is out of range.
    """
    for name, value in (("block_size", block_size), ("threads", threads)):
        if value is not None and value < 1:
            msg = f"{name} is {value}; it must be at least 1"
            raise ValueError(msg)
    if not 0 < memory_share <= 1:
        msg = f"memory_share is {memory_share}; it must be above 0 and at most 1"
        raise ValueError(msg)


def default_kv_tokens(
    device: torch.device, bytes_per_token: int, most: int, share: float = 1.0
) -> int:
    """KV tokens that fit comfortably, perhaps none, but no more than could ever be used.

    Args:
        device: where they will be.
        bytes_per_token: what each takes.
        most: as many as full batches of longest requests take.
        share: of the memory, in (0, 1]; the rest is for engines beside this one.
    """
    room = int(free_memory(device) * _SHARE[device.type] * share)
    return min(most, room // bytes_per_token)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU, of the machine or the container.

    What only caches files counts as free, since the kernel gives it up when asked for memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _numbers(Path(_MEMINFO)).get("MemAvailable")
    if available is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = available * 1024
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text(), Path(usage_file).read_text()
        except OSError:
            continue
        if limit.strip().isdigit():
            found = _numbers(Path(usage_file).with_name("memory.stat"))
            # Of cgroups of version 1, only the total is with the children, as the usage is.
            cached = found.get("total_inactive_file", found.get("inactive_file", 0))
            free = min(free, max(0, int(limit) - max(0, int(usage) - cached)))
    return free


def _numbers(file: Path) -> dict[str, int]:
    """What a file of lines of a name and a number says; nothing if there is none."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {
        line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()
    }
