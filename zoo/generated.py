"""Batches made from problems, new ones in every step: a pure function of the seed and the step."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from headrace.evaluation.split import split_of
from headrace.evaluation.task import Problem, Task
from headrace.evaluation.tasks.recall import KEYS, STATEMENT_TOKENS, Recall, ask, draw_facts
from zoo.chat import turn
from zoo.data import Phase
from zoo.model import IGNORED
from zoo.tokenizer import token_id

Row = tuple[list[int], list[int]]
"""Tokens, and the target at each: the token after it, or ``IGNORED``."""


class RowMaker(Protocol):
    """Makes the rows of a run."""

    name: str

    def rows(self, source: random.Random, length: int, count: int) -> Iterator[Row]:
        """Yield ``count`` rows of ``length`` tokens."""


class GeneratedData:
    """Rows of a maker, in phases of growing length, addressed by step."""

    def __init__(
        self,
        maker: RowMaker,
        phases: Sequence[Phase],
        token_budget: int,
        tokens_per_step: int,
        seed: int,
    ) -> None:
        self.maker, self.phases, self.seed = maker, list(phases), seed
        self.tokens_per_step = tokens_per_step
        self.steps = max(1, token_budget // tokens_per_step)
        shares = np.cumsum([phase.share for phase in self.phases])
        self.phase_ends = [round(self.steps * share) for share in shares / shares[-1]]

    def digest(self) -> str:
        """Return the SHA-256 of the settings and of the first batch, which shows the maker."""
        state = hashlib.sha256()
        settings = (self.maker.name, self.phases, self.steps, self.tokens_per_step, self.seed)
        state.update(repr(settings).encode())
        for array in self.batch(0):
            state.update(array.astype("<i8").tobytes())
        return state.hexdigest()

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets, int64 ``(rows, length)``; IndexError past the end."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not one of {self.steps}")
        phase = next(p for p, end in zip(self.phases, self.phase_ends, strict=True) if step < end)
        length = phase.context_length
        count = max(1, self.tokens_per_step // length)
        source = random.Random(f"{self.maker.name} {self.seed} {step}")
        inputs, targets = zip(*self.maker.rows(source, length, count), strict=True)
        return np.array(inputs, dtype=np.int64), np.array(targets, dtype=np.int64)


@dataclass(frozen=True)
class Share:
    """How much of a mixture a level of a task is, by the number of problems."""

    task: Task
    level: str
    weight: float


def train_problem(task: Task, level: str, source: random.Random) -> Problem:
    """Draw a problem that no test contains."""
    while True:
        problem = task.make(source, level)
        if split_of(problem.identity) == "train":
            return problem


class ConversationRows:
    """Problems as conversations, packed one behind another; only the answers are learnt."""

    def __init__(self, tokenizer: Tokenizer, shares: Sequence[Share]) -> None:
        self.tokenizer, self.shares = tokenizer, list(shares)
        self.pad = token_id(tokenizer, "<|pad|>")
        self.weights = [share.weight for share in self.shares]
        self.name = ", ".join(
            f"{share.task.name} {share.level} {share.weight}" for share in self.shares
        )

    def rows(self, source: random.Random, length: int, count: int) -> Iterator[Row]:
        """See ``RowMaker``."""
        return pack_whole(lambda: self._conversation(source), length, count, self.pad)

    def _conversation(self, source: random.Random) -> Row:
        [share] = source.choices(self.shares, self.weights)
        problem = train_problem(share.task, share.level, source)
        asked = self._encode(turn("user", problem.question) + "<|assistant|>\n")
        answered = self._encode(f"{problem.solution}<|end|>\n")
        # The last token of the question predicts the first of the answer.
        targets = [IGNORED] * (len(asked) - 1) + answered + [IGNORED]
        return asked + answered, targets

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def pack_whole(make: Callable[[], Row], length: int, count: int, pad: int) -> Iterator[Row]:
    """Yield ``count`` rows of whole pieces, as many as fit, and padding behind them.

    A piece longer than a row is cut.
    """
    tokens, targets = make()
    for _ in range(count):
        row, learnt = tokens[:length], targets[:length]
        tokens, targets = make()
        while len(row) + len(tokens) <= length:
            row, learnt = row + tokens, learnt + targets
            tokens, targets = make()
        missing = length - len(row)
        yield row + [pad] * missing, learnt + [IGNORED] * missing


DENSE_LENGTH = 128
"""Tokens of a row up to which all rows are repetitions; of longer ones, a share that falls as their
length grows."""


class RecallRows:
    """Contexts that end in questions; a row is one context, and only the answers are learnt.

    Short rows say the same things again and again, and what was said before is learnt at each
    repetition: looking back for a key does not come of itself where a row has few answers and the
    other words of its context are good guesses.
    """

    def __init__(self, tokenizer: Tokenizer, tasks: Sequence[Recall], share: float = 0.3) -> None:
        """Give up to ``share`` of a row to questions."""
        self.tokenizer, self.tasks, self.share = tokenizer, list(tasks), share
        self.pad = token_id(tokenizer, "<|pad|>")
        self.name = ", ".join([*(task.name for task in tasks), str(share)])

    def rows(self, source: random.Random, length: int, count: int) -> Iterator[Row]:
        """See ``RowMaker``."""
        for _ in range(count):
            dense = source.random() * length < DENSE_LENGTH
            while True:
                tokens, targets = (self._repetitions if dense else self._row)(source, length)
                if any(target != IGNORED for target in targets):
                    break
            missing = length - len(tokens)
            yield tokens + [self.pad] * missing, targets + [IGNORED] * missing

    def _repetitions(self, source: random.Random, length: int) -> Row:
        """A value is learnt where its key is repeated."""
        tokens: list[int] = []
        targets: list[int] = []
        known: set[str] = set()
        for key, value in repetitions(source, length // STATEMENT_TOKENS):
            statement = self._encode(f" {key} is {value}.")
            tokens += statement
            # " KEY", " is", " VALUE" and ".": the second predicts the third.
            targets += [IGNORED, statement[2] if key in known else IGNORED, IGNORED, IGNORED]
            known.add(key)
        return tokens, targets

    def _row(self, source: random.Random, length: int) -> Row:
        passage = source.choice(self.tasks).passage(source, round(length * (1 - self.share)))
        tokens = self._encode(passage.context)
        targets = [IGNORED] * len(tokens)
        keys = [key for key in passage.answers if split_of(passage.context + ask(key)) == "train"]
        source.shuffle(keys)
        for key in keys:
            question = self._encode(ask(key))
            answer = self._encode(f" {passage.answers[key]}.")
            if len(tokens) + len(question) + len(answer) > length:
                break
            tokens += question + answer
            # The tokens that predict the answer are the question's last and all but its own last.
            targets += [IGNORED] * (len(question) - 1) + answer + [IGNORED]
        return tokens[:length], targets[:length]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def conversation_documents(tasks: Sequence[Share], count: int, seed: int) -> list[str]:
    """Return problems as chat documents, for a mixture with other text."""
    source = random.Random(f"documents {seed}")
    shares = source.choices(tasks, [share.weight for share in tasks], k=count)
    problems = [train_problem(share.task, share.level, source) for share in shares]
    return [turn("user", p.question) + turn("assistant", p.solution) for p in problems]


def repetitions(source: random.Random, count: int) -> list[tuple[str, str]]:
    """Return ``count`` statements about fewer keys, in any order."""
    facts = draw_facts(source, source.randint(2, max(2, min(len(KEYS), count // 2))))
    return source.choices(facts, k=count)


def recall_documents(tasks: Sequence[Recall], longest: int, count: int, seed: int) -> list[str]:
    """Return contexts with all their questions answered, of up to ``longest`` tokens.

    Every third is one of repetitions.
    """
    source = random.Random(f"recall {seed}")
    documents = []
    for number in range(count):
        length = round(64 * (longest / 64) ** source.random())
        if number % 3 == 0:
            facts = repetitions(source, length // STATEMENT_TOKENS)
            documents.append("".join(f" {key} is {value}." for key, value in facts))
            continue
        passage = source.choice(tasks).passage(source, round(length * 0.7))
        document, left = passage.context, length - round(length * 0.7)
        for key in source.sample(list(passage.answers), len(passage.answers)):
            left -= 6
            if left < 0:
                break
            if split_of(passage.context + ask(key)) == "train":
                document += f"{ask(key)} {passage.answers[key]}."
        documents.append(document)
    return documents
