"""Scissorhands: each head keeps the slots that its queries keep coming back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.method import MethodCard
from headrace.contracts.slot_policy import CompactionSchedule, SlotPolicy

TIE = 1e-3
"""Of the attention itself, which decides between slots that stood out equally often."""


@dataclass(frozen=True, slots=True)
class Scissorhands(SlotPolicy):
    """Keep a fixed number of slots: those that got more than the average attention most often.

    It is counted over the last inputs before the cache is reduced (section 4, algorithms 1 and 2);
    the query heads that share keys count by their mean.

    Args:
        budget: slots that every head of every layer keeps, rounded up to whole pages.
        drop: as a share of the budget, how many more there are before they are reduced again.
        history: inputs whose attention is counted.
        recent: the newest slots, which always stay.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache "
        "Compression at Test Time",
        summary="Keeps a fixed number of slots, in every head those that stood out most often.",
        guarantee="lossy",
    )

    budget: int = 1024
    drop: float = 0.5
    history: int = 64
    recent: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.drop <= 1:
            raise ValueError(f"drop must be above 0 and at most 1, got {self.drop}")
        if not 0 <= self.recent < self.budget:
            raise ValueError(f"recent must be below the budget of {self.budget}, got {self.recent}")
        if not 1 <= self.history <= self.budget * self.drop:
            raise ValueError(
                f"history must be between 1 and budget x drop, {int(self.budget * self.drop)}, "
                f"got {self.history}"
            )

    def schedule(self, block_size: int) -> CompactionSchedule:
        budget, interval = (
            -(-int(slots) // block_size) * block_size
            for slots in (self.budget, self.budget * self.drop)
        )
        return CompactionSchedule(budget, interval, self.history)

    def observe(self, known: Tensor, weights: Tensor, past: int) -> None:
        seen = past + torch.arange(1, weights.shape[1] + 1, device=weights.device)
        known += ((weights >= 1 / seen[:, None]) + TIE * weights).sum(dim=1)

    def rank(self, known: Tensor) -> Tensor:
        ranks = known.clone()
        ranks[:, known.shape[1] - self.recent :] = float("inf")
        return ranks
