"""Rearrangement: apply instructions to a row of letters, one after the other."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from headrace.evaluation.task import Problem, Task, final_answer

LETTERS = 6
"""In a row."""

Row = list[str]

INSTRUCTIONS: dict[str, Callable[[Row], Row]] = {
    "reverse": lambda row: row[::-1],
    "rotate left": lambda row: row[1:] + row[:1],
    "rotate right": lambda row: row[-1:] + row[:-1],
    "swap ends": lambda row: [row[-1], *row[1:-1], row[0]],
    "swap middle": lambda row: [*row[:2], row[3], row[2], *row[4:]],
    "swap halves": lambda row: row[3:] + row[:3],
    "sort": sorted,
    "swap pairs": lambda row: [row[1], row[0], row[3], row[2], row[5], row[4]],
}


class Rearrangement(Task):
    """The level is the number of instructions; the solution writes the row after each."""

    name = "rearrangement"
    levels = ("2", "5", "10")

    def max_tokens(self, level: str) -> int:
        return (LETTERS + 6) * (int(level) + 3)

    def make(self, source: random.Random, level: str) -> Problem:
        row = source.sample(string.ascii_lowercase, LETTERS)
        names = source.choices(list(INSTRUCTIONS), k=int(level))
        question = f"Start with {' '.join(row)}. Then {', '.join(names)}."
        lines = []
        for name in names:
            row = INSTRUCTIONS[name](row)
            lines.append(f"{name}: {' '.join(row)}")
        answer = " ".join(row)
        return Problem("", question, "\n".join([*lines, f"Answer: {answer}"]), answer)

    def score(self, problem: Problem, completion: str) -> float:
        return float(final_answer(completion) == problem.answer)
