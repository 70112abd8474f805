"""What several attempts are worth: pass@1, majority of 8, and the verifier's best of 8.

python -m zoo.selection
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace import LLM, SamplingParams
from headrace.evaluation.statistics import mean_estimate, paired_difference
from headrace.evaluation.suite import make_task
from headrace.evaluation.task import Problem, final_answer
from headrace.evaluation.task_run import TaskPlan, choose_problems, run_task
from zoo.recipe import MODELS
from zoo.verifier import RIGHT, WRONG, judgement_prompt

SAMPLES, TEMPERATURE = 8, 0.8
TASKS = ("arithmetic", "countdown", "rearrangement")


def majority(completions: Sequence[str]) -> int:
    """Return the index of the first completion whose final answer is given most often."""
    answers = [final_answer(text) for text in completions]
    counts = Counter(answer for answer in answers if answer)
    if not counts:
        return 0
    return answers.index(counts.most_common(1)[0][0])


def judge(llm: LLM, problems: Sequence[Problem], attempts: Sequence[Sequence[str]]) -> list[int]:
    """Return for each problem the index of the attempt that the verifier holds most probable."""
    prompts = [
        judgement_prompt(problem.question, text)
        for problem, texts in zip(problems, attempts, strict=True)
        for text in texts
    ]
    [right], [wrong] = (llm.tokenize(text) for text in (RIGHT, WRONG))
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=64)
    odds = []
    for output in llm.generate(prompts, params):
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        found = [logprobs[0][t].logprob if t in logprobs[0] else -math.inf for t in (right, wrong)]
        odds.append(found[0] - found[1] if found[1] > -math.inf else found[0])
    chosen, place = [], 0
    for texts in attempts:
        part = odds[place : place + len(texts)]
        chosen.append(part.index(max(part)))
        place += len(texts)
    return chosen


def measure(model: Path, verifier: Path, count: int) -> list[dict[str, Any]]:
    """Return a row for every level of every task: scores, and paired differences from pass@1.

    Raises:
        SystemExit: there is no verifier; the message says how to make it.
    """
    if not verifier.is_dir():
        raise SystemExit(f"{verifier} does not exist; python -m zoo.verifier makes it")
    plans = [
        TaskPlan(task, level, count, samples=SAMPLES, temperature=TEMPERATURE)
        for task in map(make_task, TASKS)
        for level in task.levels
    ]
    with LLM(str(model)) as llm:
        results = [run_task(llm, plan, seed=0) for plan in plans]
    rows = []
    with LLM(str(verifier)) as llm:
        for plan, result in zip(plans, results, strict=True):
            problems = choose_problems(plan, 0)
            pairs = list(zip(problems, result.completions, strict=True))
            chosen = {
                "majority": [majority(texts) for _, texts in pairs],
                "verifier": judge(llm, problems, result.completions),
            }
            first = mean_estimate(result.scores)
            row: dict[str, Any] = {"measure": plan.name, "pass@1": asdict(first)}
            for name, places in chosen.items():
                scores = [
                    plan.task.score(problem, texts[place])
                    for (problem, texts), place in zip(pairs, places, strict=True)
                ]
                row[name] = asdict(mean_estimate(scores))
                row[f"{name} - pass@1"] = asdict(paired_difference(result.scores, scores))
            rows.append(row)
    return rows


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(prog="python -m zoo.selection", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODELS / "reason")
    parser.add_argument("--verifier", type=Path, default=MODELS / "verifier")
    parser.add_argument("--count", type=int, default=200, help="problems of each level")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.verifier, options.count), indent=1))


if __name__ == "__main__":
    main()
