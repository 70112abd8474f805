"""A policy whose choice of slots is arbitrary and known: what engines are tested with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headrace.contracts.method import MethodCard
from headrace.contracts.slot_policy import CompactionSchedule, SlotPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HashedSlots(SlotPolicy):
    """Keeps slots by the hash of what came before."""

    card: ClassVar[MethodCard] = MethodCard(
        title="",
        summary="Keeps slots by their hash.",
        guarantee="lossy",
    )

    budget: int = 4
    interval: int = 4
    window: int = 2

    def schedule(self, block_size: int) -> CompactionSchedule:
        budget, interval = (-(-x // block_size) * block_size for x in (self.budget, self.interval))
        return CompactionSchedule(budget, interval, self.window)

    def observe(self, known: Tensor, weights: Tensor, past: int) -> None:
        raise NotImplementedError("there are no tensors in simulations")

    def rank(self, known: Tensor) -> Tensor:
        raise NotImplementedError("there are no tensors in simulations")

    @staticmethod
    def choose(history: int, group: int, slots: Sequence[int], count: int) -> list[int]:
        """Which of ``slots`` stay, in their order."""
        order = sorted(range(len(slots)), key=lambda i: hash((history, group, i)))
        return [slots[i] for i in sorted(order[:count])]
