"""What a scheduling policy sees and decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class SequenceView(Protocol):
    """The part of a sequence that a policy may look at."""

    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> int: ...
    @property
    def num_pending(self) -> int: ...
    @property
    def num_slots(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StepBudget:
    """How much one step may hold."""

    tokens: int
    rows: int


class SchedulerPolicy(ABC):
    """Decides order, budget and victims. It must be consistent: ``key`` is a total order, and a
    sequence is only ever preempted for one that comes before it, so the first always proceeds.
    """

    @abstractmethod
    def key(self, sequence: SequenceView) -> tuple[int, ...]:
        """Sort key: smaller is served first."""

    @abstractmethod
    def budget(self, running: Sequence[SequenceView], limit: StepBudget) -> StepBudget:
        """The budget of the coming step, at most ``limit``."""

    def victim(self, running: Sequence[SequenceView]) -> int:
        """Index into ``running`` (in order of ``key``) of the sequence to preempt."""
        return len(running) - 1

    def overtakes(self, waiting: SequenceView, running: SequenceView) -> bool:
        """Whether ``running`` is preempted for ``waiting``, which finds no room. It must come
        later in order.
        """
        return False
