"""Scheduling policies, by name."""

from __future__ import annotations

from headrace.contracts.scheduling import SchedulerPolicy
from headrace.errors import ConfigurationError
from headrace.registry import Registry

SCHEDULING_POLICIES = Registry(
    "scheduling policy",
    {
        "fcfs": "headrace.engine.policies.fcfs:FirstComeFirstServed",
        "priority": "headrace.engine.policies.priority:PriorityFirst",
    },
)


def make_policy(name: str) -> SchedulerPolicy:
    """The policy of that name. Raises ConfigurationError that lists the known ones."""
    try:
        policy: SchedulerPolicy = SCHEDULING_POLICIES.resolve(name)()
    except KeyError as error:
        raise ConfigurationError(f"scheduling_policy: {error.args[0]}") from None
    return policy
