"""Recall from a long context, after "RULER: What's the Real Context Size of Your Language Models?".

A context is a row of statements, " KEY is VALUE.", among sentences that state nothing. Keys, values
and the words of those sentences are three lists of common words, each one token for the models of
the family; for them a context has as many tokens as words and signs.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass

from headrace.evaluation.task import Problem, Task

_KEYS = """
name line string object type list module class path function error node header state message
tuple format source mode event version frame log method prefix widget user app thread attribute
directory server item block process socket element package config parent address action handler
sequence tag group host stream statement section member position buffer target content document
screen signal archive record field point tree button
"""
_VALUES = """
data time code number command encoding index size case option context base entry program manager
library platform domain locale loop chunk column cookie map charset day word memory queue
selector suffix theme token title tests task table support stack space sign shell root result
resource request release reference range proxy protocol policy pipe pattern order operation
output offset menu link limit level label height
"""
_FILLER = """
the not for with that are from get this set can other has will use when used should must all any
but one only does start was then over last same into read write call make find keep like most
more both each until after before while because here always never once long short old new
different possible common simple special current given final right left true false even still
just also such where without within under above below between through during
"""
KEYS, VALUES, FILLER = (tuple(words.split()) for words in (_KEYS, _VALUES, _FILLER))
"""64 keys, 64 values and words of sentences that state nothing, without a common word."""

SENTENCE = 7
"""Words of a sentence that states nothing."""
STATEMENT_TOKENS = 4
QUESTION_TOKENS = 4
SPARSENESS = 2
"""Tokens in all for each token of a statement, where the keys last."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A context and everything that can be asked of it.

    Args:
        answers: key -> what " KEY is" is followed by, in a question.
    """

    context: str
    answers: dict[str, str]


class Recall(Task):
    """The level is the length of the prompt in tokens of the family."""

    levels = ("256", "1024", "2048", "4096", "8192")
    chat = False
    stop = (".",)

    def max_tokens(self, level: str) -> int:
        return 16

    def make(self, source: random.Random, level: str) -> Problem:
        passage = self.passage(source, int(level) - QUESTION_TOKENS)
        key, answer = source.choice(list(passage.answers.items()))
        return Problem(passage.context, ask(key), f" {answer}.", answer)

    def score(self, problem: Problem, completion: str) -> float:
        """The share of the values that were said, none for any that was not asked for."""
        wanted = problem.answer.split(", ")
        said = completion.split(".")[0].strip().split(", ")
        return len(set(wanted) & set(said)) / max(len(wanted), len(said))

    def passage(self, source: random.Random, length: int) -> Passage:
        """A context of ``length`` tokens, statements at random places in it."""
        statements, answers = self.state(source, length // (STATEMENT_TOKENS * SPARSENESS))
        left = length - sum(len(text.split()) + 1 for text in statements)
        places: list[list[str]] = [[] for _ in range(len(statements) + 1)]
        for _ in range(left // (SENTENCE + 1)):
            words = source.choices(FILLER, k=SENTENCE)
            source.choice(places).append(" " + " ".join(words) + ".")
        rest = left % (SENTENCE + 1)
        if rest > 1:
            places[0].append(" " + " ".join(source.choices(FILLER, k=rest - 1)) + ".")
        parts = list(places[0])
        for statement, sentences in zip(statements, places[1:], strict=True):
            parts += [statement, *sentences]
        return Passage("".join(parts), answers)

    @abstractmethod
    def state(self, source: random.Random, most: int) -> tuple[list[str], dict[str, str]]:
        """Up to ``most`` statements in their order, at least one, and the answers they give."""


def ask(key: str) -> str:
    """The question for a key."""
    return f"\n? {key} is"


def draw_facts(source: random.Random, count: int) -> list[tuple[str, str]]:
    """Different keys with a value each."""
    count = max(1, min(count, len(KEYS)))
    return list(zip(source.sample(KEYS, count), source.choices(VALUES, k=count), strict=True))


class Needle(Recall):
    """One statement in the whole context."""

    name = "needle"

    def state(self, source: random.Random, most: int) -> tuple[list[str], dict[str, str]]:
        [(key, value)] = draw_facts(source, 1)
        return [f" {key} is {value}."], {key: value}


class MultiKey(Recall):
    """As many statements as there are keys, or half of the context."""

    name = "multi-key"

    def state(self, source: random.Random, most: int) -> tuple[list[str], dict[str, str]]:
        facts = draw_facts(source, most)
        return [f" {key} is {value}." for key, value in facts], dict(facts)


class MultiValue(Recall):
    """Some keys are given three values, at different places; all are asked for."""

    name = "multi-value"

    def state(self, source: random.Random, most: int) -> tuple[list[str], dict[str, str]]:
        keys = source.sample(KEYS, max(1, min(most // 3, len(KEYS) // 3)))
        values = {key: source.sample(VALUES, min(3, max(1, most))) for key in keys}
        facts = [(key, value) for key in keys for value in values[key]]
        source.shuffle(facts)
        answers: dict[str, str] = {}
        for key, value in facts:
            answers[key] = f"{answers[key]}, {value}" if key in answers else value
        return [f" {key} is {value}." for key, value in facts], answers


class VariableTracking(Recall):
    """Half of the keys are given not a value but an earlier key; what it stands for is asked."""

    name = "variable-tracking"

    def state(self, source: random.Random, most: int) -> tuple[list[str], dict[str, str]]:
        facts = draw_facts(source, max(2, most))
        meant: dict[str, str] = {}
        statements, answers = [], {}
        for index, (key, value) in enumerate(facts):
            if index and source.random() < 0.5:
                other = source.choice(list(meant))
                statements.append(f" {key} is {other}.")
                meant[key] = answers[key] = meant[other]
            else:
                statements.append(f" {key} is {value}.")
                meant[key] = value
        return statements, answers or dict(list(meant.items())[-1:])
