"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.contracts.scheduling import SchedulerPolicy, SequenceView, StepBudget


class FirstComeFirstServed(SchedulerPolicy):
    """Order of arrival; priorities are ignored."""

    def key(self, sequence: SequenceView) -> tuple[int, ...]:
        return (sequence.arrival,)

    def budget(self, running: Sequence[SequenceView], limit: StepBudget) -> StepBudget:
        return limit
