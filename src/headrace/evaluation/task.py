"""What a task is: problems at several levels, and how a completion is scored."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from headrace.evaluation.split import Split, split_of
from headrace.registry import Registry


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem and its solution.

    Args:
        context: what is read before the question is known; may be empty.
        question: follows the context directly.
        solution: how models are taught to go on from there, to the end of their turn.
        answer: what decides, in the form that the task's ``score`` compares.
    """

    context: str
    question: str
    solution: str
    answer: str

    @property
    def identity(self) -> str:
        """Two problems are the same if this is."""
        return self.context + self.question


class Task(ABC):
    """Makes problems and scores completions. A problem depends on the random source alone.

    Attributes:
        name: in tables and on the command line.
        levels: from easy to hard.
        chat: whether the problem is a user's turn, rather than a text to go on with.
        stop: strings that end a completion.
    """

    name: ClassVar[str]
    levels: ClassVar[tuple[str, ...]]
    chat: ClassVar[bool] = True
    stop: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def make(self, source: random.Random, level: str) -> Problem:
        """A problem of a level."""

    @abstractmethod
    def max_tokens(self, level: str) -> int:
        """Tokens that a completion may take: more than any solution needs."""

    @abstractmethod
    def score(self, problem: Problem, completion: str) -> float:
        """How right a completion is, from 0 to 1."""

    def problems(self, split: Split, level: str, seed: int) -> Iterator[Problem]:
        """Problems of a split and level without end, the same for the same seed."""
        if level not in self.levels:
            raise ValueError(f"{self.name}: level {level!r} is none of {', '.join(self.levels)}")
        source = random.Random(f"{self.name} {level} {seed}")
        while True:
            problem = self.make(source, level)
            if split_of(problem.identity) == split:
                yield problem


TASKS = Registry(
    "task",
    {
        "needle": "headrace.evaluation.tasks.recall:Needle",
        "multi-key": "headrace.evaluation.tasks.recall:MultiKey",
        "multi-value": "headrace.evaluation.tasks.recall:MultiValue",
        "variable-tracking": "headrace.evaluation.tasks.recall:VariableTracking",
        "arithmetic": "headrace.evaluation.tasks.arithmetic:Arithmetic",
        "countdown": "headrace.evaluation.tasks.countdown:Countdown",
        "code-completion": "headrace.evaluation.tasks.code_completion:CodeCompletion",
        "rearrangement": "headrace.evaluation.tasks.rearrangement:Rearrangement",
    },
)
"""Name -> ``Task``."""


def final_answer(completion: str, mark: str = "Answer:") -> str:
    """What follows the last mark, up to the end of its line; empty if there is none."""
    _, found, rest = completion.rpartition(mark)
    return rest.strip().split("\n")[0].strip() if found else ""
