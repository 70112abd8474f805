"""Random eviction: the least that a policy can do, and what every other one must beat."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headrace.contracts.kv_policy import KVPolicy, SealedPages
from headrace.contracts.method import MethodCard


@dataclass(frozen=True, slots=True)
class RandomEviction(KVPolicy):
    """Keep a share of the sealed pages, whichever, and the tail.

    Of every 1 / ``keep`` pages one stays: that which draws the smallest number. A page draws the
    same number every time, so what is left of a text does not depend on the chunks it was read in.

    Args:
        keep: share of the pages that stays, above 0 and up to 1.
        seed: of the draws.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="",
        summary="Keeps a share of the KV pages, whichever: what every policy must beat.",
        guarantee="lossy",
        request_options=("keep", "seed"),
    )

    keep: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")

    def drop(self, views: Sequence[SealedPages]) -> list[list[int]]:
        return [self._drop(view) for view in views]

    def _drop(self, view: SealedPages) -> list[int]:
        best: dict[int, int] = {}
        for ordinal in view.ordinals:
            share = math.floor(ordinal * self.keep)
            best[share] = min(best.get(share, ordinal), ordinal, key=self._draw)
        kept = set(best.values())
        return [ordinal for ordinal in view.ordinals if ordinal not in kept]

    def _draw(self, ordinal: int) -> bytes:
        return hashlib.blake2b(f"{self.seed} {ordinal}".encode(), digest_size=8).digest()

    def most_pages(self, sealed: int) -> int:
        return math.floor((sealed - 1) * self.keep) + 1 if sealed else 0
