"""Suites: which problems, how many, and how much text."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigurationError
from headrace.evaluation.task import TASKS, Task
from headrace.evaluation.task_run import TaskPlan


@dataclass(frozen=True, slots=True)
class Suite:
    """What is measured.

    Args:
        window, tokens: of the text that perplexity is measured on.
        plans: problems.
    """

    name: str
    window: int
    tokens: int
    plans: tuple[TaskPlan, ...]


def make_task(name: str) -> Task:
    """The task of that name. Raises ConfigurationError that lists the known ones."""
    if name not in TASKS:
        raise ConfigurationError(f"task: {name!r} is unknown; known: {', '.join(TASKS)}")
    task: Task = TASKS.resolve(name)()
    return task


LONG = 2048
"""Tokens of a context above which there are half as many problems."""


def _plans(count: int, lengths: tuple[str, ...], hard: bool) -> tuple[TaskPlan, ...]:
    plans = []
    for name in ("needle", "multi-key", "multi-value", "variable-tracking"):
        task = make_task(name)
        counts = [count if int(length) <= LONG else count // 2 for length in lengths]
        plans += [TaskPlan(task, *each) for each in zip(lengths, counts, strict=True)]
        plans.append(TaskPlan(task, lengths[-1], counts[-1], agnostic=True))
    for name in ("arithmetic", "countdown", "rearrangement"):
        task = make_task(name)
        levels = task.levels if hard else task.levels[:2]
        plans += [TaskPlan(task, level, count) for level in levels]
    plans.append(TaskPlan(make_task("code-completion"), "line", 2 * count))
    return tuple(plans)


SUITE_NAMES = ("quick", "full")


def make_suite(name: str) -> Suite:
    """The suite of that name. Raises ConfigurationError that lists the known ones."""
    if name == "quick":
        return Suite(name, 1024, 16_384, _plans(50, ("256", "1024"), hard=False))
    if name == "full":
        lengths = ("1024", "2048", "4096", "8192")
        return Suite(name, 2048, 131_072, _plans(200, lengths, hard=True))
    raise ConfigurationError(f"suite: {name!r} is unknown; known: {', '.join(SUITE_NAMES)}")
