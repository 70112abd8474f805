"""H2O: each head keeps its heavy hitters and what is recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headrace.contracts.method import MethodCard
from headrace.contracts.slot_policy import CompactionSchedule, SlotPolicy


@dataclass(frozen=True, slots=True)
class HeavyHitterOracle(SlotPolicy):
    """Keep a fixed number of slots: half of them the newest, half those with most attention ever.

    Attention is summed over all queries since a slot was filled (section 4.1, algorithm 1).

    Args:
        budget: slots that every head of every layer keeps, rounded up to whole pages.
        drop: as a share of the budget, how many more there are before they are reduced again.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language "
        "Models",
        summary="Keeps a fixed number of slots: the newest, and those with most attention so far.",
        guarantee="lossy",
    )

    adds_up: ClassVar[bool] = True
    budget: int = 1024
    drop: float = 0.25

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise ValueError(f"budget must be at least 2, got {self.budget}")
        if not 0 < self.drop <= 1:
            raise ValueError(f"drop must be above 0 and at most 1, got {self.drop}")

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """None: sums go on from one reduction to the next and are not kept with pages."""
        return 0

    def schedule(self, block_size: int) -> CompactionSchedule:
        budget, interval = (
            -(-max(1, int(slots)) // block_size) * block_size
            for slots in (self.budget, self.budget * self.drop)
        )
        return CompactionSchedule(budget, interval, budget + interval)

    def observe(self, known: Tensor, weights: Tensor, past: int) -> None:
        known += weights.sum(dim=1)

    def rank(self, known: Tensor) -> Tensor:
        ranks = known.clone()
        ranks[:, known.shape[1] - self.budget // 2 :] = float("inf")
        return ranks

    def carry(self, known: Tensor) -> Tensor:
        return known
