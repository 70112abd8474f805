"""How many of base's greedy tokens draft proposes: ``python -m zoo.acceptance``."""

import argparse
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from headrace import LLM, RequestOutput, SamplingParams
from headrace.evaluation.statistics import Estimate, mean_estimate
from headrace.evaluation.suite import make_task
from zoo.recipe import MODELS

PROMPTS, TOKENS = 100, 64
LENGTH = 4
"""Tokens that are guessed at a time."""


@dataclass(frozen=True)
class Acceptance:
    """Of greedy continuations of held-out code.

    ``rate`` is the share of tokens that are also the draft's likeliest, given the same text before
    them; ``run`` is how many such tokens follow each other on average. ``guessed`` is the share of
    accepted tokens among the guesses of the engine's speculation, ``LENGTH`` at a time, and
    ``per_pass`` how many tokens one pass of the model gives with it.
    """

    rate: Estimate
    run: float
    guessed: float
    per_pass: float


def measure(model: Path, draft: Path) -> Acceptance:
    """Let the model write, and ask the draft about every token."""
    task = make_task("code-completion")
    problems = islice(task.problems("test", "line", 0), PROMPTS)
    with LLM(str(model)) as llm:
        prompts = [llm.tokenize(problem.context) for problem in problems]
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    written = [output.outputs[0].token_ids for output in outputs]
    with LLM(str(draft)) as llm:
        texts = [[*ids, *more] for ids, more in zip(prompts, written, strict=True)]
        asked = SamplingParams(max_tokens=0, prompt_logprobs=0)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in texts], asked)
    shares, runs = [], 0
    for ids, text, answer in zip(prompts, texts, answers, strict=True):
        assert answer.prompt_logprobs is not None
        entries = zip(text[len(ids) :], answer.prompt_logprobs[len(ids) :], strict=True)
        agreed = [entry is not None and entry[token].rank == 1 for token, entry in entries]
        shares.append(sum(agreed) / len(agreed))
        runs += sum(not agrees for agrees in agreed)
    accepted = sum(shares) * TOKENS
    guesser = f"draft-model:model={draft},length={LENGTH},adaptive=false"
    # Prompts come first in a step's budget; with few at a time, there is always room for guesses.
    with LLM(str(model), methods=(guesser,), max_num_seqs=4) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return Acceptance(mean_estimate(shares), accepted / max(1, runs), *speculated(outputs))


def speculated(outputs: list[RequestOutput]) -> tuple[float, float]:
    """Return the share of guesses that were accepted, and the tokens a pass, of requests."""
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    drafted = sum(each.num_draft_tokens for each in metrics)
    accepted = sum(each.num_accepted_tokens for each in metrics)
    passes = sum(len(output.outputs[0].token_ids) for output in outputs) - accepted
    return accepted / max(1, drafted), 1 + accepted / max(1, passes)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m zoo.acceptance", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODELS / "base")
    parser.add_argument("--draft", type=Path, default=MODELS / "draft")
    options = parser.parse_args()
    found = measure(options.model, options.draft)
    print(
        f"agreed {found.rate}, {found.run:.2f} tokens in a row; accepted {found.guessed:.3f} of "
        f"the guesses, {found.per_pass:.2f} tokens a pass"
    )


if __name__ == "__main__":
    main()
