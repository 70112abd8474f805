"""Where the engine takes its time from."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Clock(ABC):
    """Seconds on a scale of its own: monotonic, with an arbitrary zero."""

    @abstractmethod
    def now(self) -> float:
        """The present time in seconds."""
