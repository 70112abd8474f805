"""Train the model that judges what reason writes: ``python -m zoo.verifier``.

It reads a problem and a solution as text and says 1 or 0. It is taught by solutions that reason
draws itself, to problems that no test contains, and by whether their answers are right.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from headrace import LLM, SamplingParams
from headrace.evaluation.task import Problem
from zoo.chat import turn
from zoo.data import Phase
from zoo.generated import GeneratedData, Row, pack_whole, train_problem
from zoo.model import IGNORED
from zoo.reason import MODEL, shares
from zoo.recipe import CACHE, MODELS, Recipe, run
from zoo.tokenizer import token_id
from zoo.train import TrainConfig

PROBLEMS, SAMPLES = 8_000, 4
TEMPERATURE = 0.8
TOKEN_BUDGET = 4_000_000
RIGHT, WRONG = "1", "0"


@dataclass(frozen=True)
class Attempt:
    """A solution that was drawn, and whether it is right."""

    question: str
    solution: str
    right: bool


def judgement_prompt(question: str, solution: str) -> str:
    """Return what the verifier reads; ``RIGHT`` or ``WRONG`` follows."""
    return turn("user", f"{question}\n{solution.strip()}") + "<|assistant|>\n"


def draw_attempts(seed: int) -> list[Attempt]:
    """Let reason solve new problems a few times each."""
    source = random.Random(f"verifier {seed}")
    mixture = shares()
    chosen = source.choices(mixture, [share.weight for share in mixture], k=PROBLEMS)
    problems: list[Problem] = [train_problem(share.task, share.level, source) for share in chosen]
    with LLM(str(MODELS / "reason")) as llm:
        params = [
            SamplingParams(
                n=SAMPLES,
                temperature=TEMPERATURE,
                max_tokens=share.task.max_tokens(share.level),
                seed=seed + number,
            )
            for number, share in enumerate(chosen)
        ]
        messages = [[{"role": "user", "content": problem.question}] for problem in problems]
        outputs = llm.chat(messages, params)
    return [
        Attempt(
            problem.question,
            completion.text,
            share.task.score(problem, completion.text) == 1,
        )
        for share, problem, output in zip(chosen, problems, outputs, strict=True)
        for completion in output.outputs
    ]


def kept_attempts(path: Path, seed: int) -> list[Attempt]:
    """Return the attempts of an earlier run, or draw and keep them."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for attempt in draw_attempts(seed):
                print(json.dumps(asdict(attempt)), file=file)
        partial.rename(path)
    with path.open(encoding="utf-8") as file:
        return [Attempt(**json.loads(line)) for line in file]


class JudgementRows:
    """Attempts with their judgement, packed; as many right ones as wrong ones."""

    name = "judgements"

    def __init__(self, tokenizer: Tokenizer, attempts: list[Attempt]) -> None:
        self.tokenizer = tokenizer
        self.pad = token_id(tokenizer, "<|pad|>")
        self.sides = [[a for a in attempts if a.right is right] for right in (True, False)]
        if not all(self.sides):
            raise ValueError("reason's attempts are all right or all wrong; nothing can be learnt")

    def rows(self, source: random.Random, length: int, count: int) -> Iterator[Row]:
        """See ``RowMaker``."""
        return pack_whole(lambda: self._judged(source), length, count, self.pad)

    def _judged(self, source: random.Random) -> Row:
        attempt = source.choice(source.choice(self.sides))
        prompt = judgement_prompt(attempt.question, attempt.solution)
        asked = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        judgement = RIGHT if attempt.right else WRONG
        [answer] = self.tokenizer.encode(judgement, add_special_tokens=False).ids
        return [*asked, answer], [*[IGNORED] * (len(asked) - 1), answer, IGNORED]


def make_data(tokenizer: Tokenizer, config: TrainConfig) -> GeneratedData:
    """Return judged attempts in random order."""
    attempts = kept_attempts(CACHE / "verifier" / f"attempts-{config.seed}.jsonl", config.seed)
    maker = JudgementRows(tokenizer, attempts)
    phases = (Phase(1.0, 512),)
    return GeneratedData(maker, phases, config.token_budget, config.tokens_per_step, config.seed)


RECIPE = Recipe(
    "verifier",
    "Judges solutions by their text: whether the final answer of what reason wrote is right.",
    MODEL,
    TrainConfig(token_budget=TOKEN_BUDGET, adamw_rate=1e-3, muon_rate=0.005),
    make_data,
    start="reason",
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
