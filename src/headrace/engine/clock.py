"""Real and virtual time."""

from __future__ import annotations

import time

from headrace.contracts.clock import Clock


class MonotonicClock(Clock):
    """Wall time that never goes back."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock(Clock):
    """Time that moves only when told: simulations and tests of the engine run on it."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` >= 0."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self._now += seconds

    def advance_to(self, instant: float) -> None:
        """Move forward to ``instant``; does nothing when it has passed."""
        self._now = max(self._now, instant)
