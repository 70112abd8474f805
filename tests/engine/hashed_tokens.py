"""A method whose choice of tokens is arbitrary and known: what engines are tested with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headrace.contracts.method import MethodCard
from headrace.contracts.token_pruning import TokenPruningMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HashedTokens(TokenPruningMethod):
    """Each stage has a share of the tokens of the one before, by their hash."""

    card: ClassVar[MethodCard] = MethodCard("", "Drops tokens by their hash.", "lossy")

    part: int = 3
    share: float = 0.5

    @property
    def part_tokens(self) -> int:
        return self.part

    @property
    def window(self) -> int:
        return 1

    def begins(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def left(self, stage: int, tokens: int) -> int:
        return max(1, math.ceil(tokens * self.share**stage))

    def choose(self, weights: Tensor, count: int, first: bool) -> Tensor:
        raise NotImplementedError("there are no tensors in simulations")

    def tokens_of(self, stage: int, histories: Sequence[int], start: int, end: int) -> list[int]:
        """Those of a part that a stage has."""
        found = list(range(start, end))
        for each in range(1, stage + 1):
            order = sorted(found[:-1], key=lambda i: hash((histories[end - 1], each, i)))
            found = sorted([*order[: self.left(each, end - start) - 1], end - 1])
        return found
