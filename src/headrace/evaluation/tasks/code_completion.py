"""Code completion: the rest of a line of a module that no model of the family has seen."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from headrace.evaluation.held_out import held_out_texts
from headrace.evaluation.split import Split
from headrace.evaluation.task import Problem, Task

SHORTEST_REST = 6
"""Characters that are asked for, at least."""
CONTEXT_LINES = 40


class CodeCompletion(Task):
    """Go on with a line whose beginning is given, behind the lines before it.

    There are problems of the test split only: whole modules are held out.
    """

    name = "code-completion"
    levels = ("line",)
    chat = False
    stop = ("\n",)

    def max_tokens(self, level: str) -> int:
        return 48

    def problems(self, split: Split, level: str, seed: int) -> Iterator[Problem]:
        if split != "test":
            raise ValueError(f"{self.name}: there are problems of the test split only")
        source = random.Random(f"{self.name} {level} {seed}")
        while True:
            yield self.make(source, level)

    def make(self, source: random.Random, level: str) -> Problem:
        lines, number = source.choice(_places())
        line = lines[number]
        indent = len(line) - len(line.lstrip())
        cut = source.randint(indent + 1, len(line) - SHORTEST_REST)
        # Not within a word: what a tokenizer makes of half a word is no question of code.
        while cut > indent + 1 and line[cut - 1].isalnum() and line[cut].isalnum():
            cut -= 1
        context = "\n".join(lines[max(0, number - CONTEXT_LINES) : number]) + "\n"
        return Problem(context, line[:cut].rstrip(), line[cut:], line[cut:].strip())

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion.split("\n")[0].strip() == problem.answer)


@functools.cache
def _places() -> list[tuple[list[str], int]]:
    """The lines of every module with the numbers of those that can be asked for."""
    found = []
    for text in held_out_texts().values():
        lines = text.splitlines()
        for number, line in enumerate(lines):
            code = line.strip()
            if number >= 8 and len(code) >= 2 * SHORTEST_REST and not code.startswith(("#", '"')):
                found.append((lines, number))
    return found
