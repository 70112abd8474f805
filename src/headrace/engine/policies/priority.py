"""Priorities first, then order of arrival."""

from __future__ import annotations

from headrace.contracts.scheduling import SequenceView
from headrace.engine.policies.fcfs import FirstComeFirstServed


class PriorityFirst(FirstComeFirstServed):
    """Smaller ``priority`` is served first, and takes the place of larger ones when full."""

    def key(self, sequence: SequenceView) -> tuple[int, ...]:
        return (sequence.priority, sequence.arrival)

    def overtakes(self, waiting: SequenceView, running: SequenceView) -> bool:
        return waiting.priority < running.priority
