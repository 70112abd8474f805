"""Countdown: reach a target with given numbers, each used once at most."""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable

from headrace.evaluation.task import Problem, Task, final_answer

LARGEST_NUMBER, LARGEST_TARGET = 20, 200

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class Countdown(Task):
    """The level is how many numbers are given; the solution in the problem uses all of them.

    Any other expression that reaches the target is as good. Of sums, the target can be reached
    without products, and the question says so.
    """

    name = "countdown"
    levels = ("3", "4", "5", "3 sums", "4 sums", "5 sums")

    def max_tokens(self, level: str) -> int:
        return 24 * int(level.split()[0]) + 32

    def make(self, source: random.Random, level: str) -> Problem:
        count, _, kind = level.partition(" ")
        signs = "+-" if kind else "+-*"
        while True:
            numbers = [source.randint(1, LARGEST_NUMBER) for _ in range(int(count))]
            found = _combine(source, numbers, signs)
            if found is not None:
                break
        target, expression, steps = found
        wanted = f"Make {target} from {', '.join(map(str, numbers))}"
        question = f"{wanted} with + and -." if kind else f"{wanted}."
        solution = "\n".join([*steps, f"Answer: {expression}"])
        return Problem("", question, solution, f"{wanted}.")

    def score(self, problem: Problem, completion: str) -> float:
        target, _, numbers = problem.answer.removeprefix("Make ").rstrip(".").partition(" from ")
        value, used = evaluate(final_answer(completion))
        given = Counter(map(int, numbers.split(", ")))
        return float(value == int(target) and not Counter(used) - given)


def _combine(
    source: random.Random, numbers: list[int], signs: str
) -> tuple[int, str, list[str]] | None:
    """Join two of the numbers until one is left: the target, its expression and the steps.

    ``None`` if a result left the range on the way.
    """
    terms = [(number, str(number)) for number in numbers]
    steps = []
    while len(terms) > 1:
        (left, left_text), (right, right_text) = (
            terms.pop(source.randrange(len(terms))) for _ in range(2)
        )
        if left < right:
            left, left_text, right, right_text = right, right_text, left, left_text
        sign = source.choice(signs)
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        if not 1 <= value <= LARGEST_TARGET:
            return None
        steps.append(f"{left}{sign}{right}={value}")
        terms.append((value, f"({left_text}{sign}{right_text})"))
    return terms[0][0], terms[0][1][1:-1], steps


def evaluate(expression: str) -> tuple[int | None, list[int]]:
    """The value of an expression of whole numbers, and the numbers in it; (None, []) if it is none.

    Only numbers, +, -, * and parentheses are taken.
    """
    if len(expression) > 200:
        return None, []
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None, []
    used: list[int] = []

    def value_of(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
        raise ValueError("not a sum, a difference or a product")

    try:
        return value_of(tree), used
    except ValueError:
        return None, []
