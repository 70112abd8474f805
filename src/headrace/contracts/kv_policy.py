"""What decides which part of the KV cache stays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SealedPages:
    """The sealed pages of one sequence, as a policy sees them when new ones have been added.

    Args:
        ordinals: of the pages that it holds, ascending; the first page that a sequence ever sealed
            is 0, and dropped ones are missing.
        sealed: pages that it has sealed so far, dropped ones included.
    """

    ordinals: Sequence[int]
    sealed: int


class KVPolicy(ABC):
    """Decides at sealing which pages a sequence keeps.

    It has no state: what it decides follows from its options and the view, so that a sequence that
    was preempted and computed again, or forked, goes on the same way.
    """

    @abstractmethod
    def drop(self, views: Sequence[SealedPages]) -> list[list[int]]:
        """For each sequence of the step, the ordinals of the pages that are freed."""

    @abstractmethod
    def most_pages(self, sealed: int) -> int:
        """Pages that are left, at most, when so many have been sealed."""
