"""Sums, differences and products, worked out step by step."""

from __future__ import annotations

import random

from headrace.evaluation.task import Problem, Task, final_answer

LARGEST = 999
"""No intermediate result is larger, or negative."""


class Arithmetic(Task):
    """Chains of operations, from the left to the right; the level is their number.

    The written solution gives each intermediate result its line.
    """

    name = "arithmetic"
    levels = ("2", "4", "6", "20")

    def max_tokens(self, level: str) -> int:
        return 16 * int(level) + 32

    def make(self, source: random.Random, level: str) -> Problem:
        value = source.randint(2, 99)
        chain, steps = str(value), []
        for _ in range(int(level)):
            operator, operand, result = _step(source, value)
            # Read from the left, each step in parentheses, so that no precedence is needed.
            chain = f"({chain}{operator}{operand})"
            steps.append(f"{value}{operator}{operand}={result}")
            value = result
        solution = "\n".join([*steps, f"Answer: {value}"])
        return Problem("", f"Compute {chain[1:-1]}.", solution, str(value))

    def score(self, problem: Problem, completion: str) -> float:
        return float(final_answer(completion) == problem.answer)


def _step(source: random.Random, value: int) -> tuple[str, int, int]:
    """An operator, its right operand and the result, which stays in range."""
    choices = []
    if value + 2 <= LARGEST:
        choices.append("+")
    if value >= 2:
        choices.append("-")
    if 2 * value <= LARGEST:
        choices.append("*")
    operator = source.choice(choices)
    if operator == "+":
        operand = source.randint(2, min(99, LARGEST - value))
        return operator, operand, value + operand
    if operator == "-":
        operand = source.randint(min(2, value), min(99, value))
        return operator, operand, value - operand
    operand = source.randint(2, max(2, min(9, LARGEST // max(value, 1))))
    return operator, operand, value * operand
