"""What is measured: loads, schedulers, clients; and the file that remembers finished cells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from penstock.bench.fitted import fitted
from penstock.bench.workload import Lengths, Workload, synthetic

SCALE = 1 / 8
BLOCK = 16
KV_TOKENS = 3200  # 120,000 / 8 / 4.7: the batch is scaled down as well
PRESETS = ("tgi", "vllm", "past-future", "past-future-artifact", "oracle")
CLIENTS = (10, 20, 40, 100)
REQUESTS = 600


@dataclass(frozen=True)
class Load:
    """A length distribution and its common cap, before scaling."""

    name: str
    prompt: str
    output: str
    cap: int
    clients: tuple[int, ...]

    def workload(self, seed: int) -> Workload:
        """The requests, scaled down."""
        if self.name == "sharegpt-o1":
            made = fitted(self.name, REQUESTS, seed)
        else:
            made = synthetic(Lengths.parse(self.prompt), Lengths.parse(self.output), REQUESTS, seed)
        return made.scaled(SCALE)

    @property
    def scaled_cap(self) -> int:
        """``max_tokens`` of every request."""
        return round(self.cap * SCALE)


LOADS = (
    Load("sharegpt-o1", "fitted", "fitted", 12_000, CLIENTS),
    Load("distribution-1", "uniform:32-4096", "uniform:2048-4096", 4096, CLIENTS),
    Load("distribution-2", "uniform:3000-5000", "uniform:3000-5000", 5000, CLIENTS),
    Load("distribution-3", "uniform:2048-4096", "uniform:32-4096", 4096, CLIENTS),
)


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    load: str
    clients: int
    preset: str
    repeat: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "/".join(map(str, asdict(self).values()))


class Book:
    """Finished cells, one JSON object per line; lines of another setting are not used."""

    def __init__(self, path: Path, setting: str) -> None:
        self._path = path
        self._setting = setting
        self.rows: dict[str, dict[str, object]] = {}
        if path.exists():
            for line in path.read_bytes().splitlines():
                row = msgspec.json.decode(line, type=dict[str, object])
                if row["setting"] == setting:
                    self.rows[str(row["key"])] = row

    def add(self, cell: Cell, numbers: dict[str, object]) -> None:
        """Remember a cell at once."""
        row = {"key": cell.key, "setting": self._setting, **asdict(cell), **numbers}
        self.rows[cell.key] = row
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
