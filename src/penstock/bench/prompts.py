"""Prompts of a wanted length that share nothing by accident.

Token ids are drawn at random, keyed by (seed, request, round), so that no two
prompts have a common prefix which a prefix cache could use, and so that a
retry asks for the same prompt again.  Requests of a trace with ``hash_ids``
share exactly the blocks that the trace says they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.bench.workload import Workload

_WORDS = tuple(
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city community name".split()
)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes the prompts of a workload.

    Attributes:
        low, high: token ids lie in ``[low, high)``; inside the vocabulary and away from
            special tokens.
    """

    workload: Workload
    seed: int = 0
    low: int = 300
    high: int = 1300

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high - 1:
            msg = f"token range is {self.low}:{self.high}; it must hold at least 2 ids from 0 up"
            raise ValueError(msg)

    def ids(self, request: int, turn: int = 0) -> list[int]:
        """Token ids of a request; ``turn`` counts how often the workload has started over."""
        length = int(self.workload.prompt[request])
        if self.workload.hash_ids is None:
            return self._draw((self.seed, 0, request, turn), length)
        ids: list[int] = []
        for block in self.workload.hash_ids[request]:
            ids += self._draw((self.seed, 1, block, turn), self.workload.hash_block)
        if len(ids) < length:
            ids += self._draw((self.seed, 2, request, turn), length - len(ids))
        return ids[:length]

    def text(self, request: int, turn: int = 0) -> str:
        """About as many tokens as asked for, as English words: for endpoints without token ids."""
        return " ".join(_WORDS[i % len(_WORDS)] for i in self.ids(request, turn))

    def _draw(self, key: tuple[int, ...], length: int) -> list[int]:
        drawn: list[int] = (
            np.random.default_rng(key).integers(self.low, self.high, size=length).tolist()
        )
        return drawn
