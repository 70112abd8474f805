"""Whether the evaluation notices what is broken, and nothing else: ``python -m zoo.trust``.

Two configurations that must lose are compared with what they were made of, on 500 problems each,
and an engine is compared with itself, with other draws, 20 times.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace import LLM
from headrace.evaluation.statistics import Difference, mean_estimate, paired_difference
from headrace.evaluation.suite import make_task
from headrace.evaluation.task_run import TaskPlan, run_task
from zoo.recipe import MODELS
from zoo.round_weights import round_checkpoint

REPEATS, TEMPERATURE = 20, 0.8
COMPUTING = tuple(
    TaskPlan(make_task(task), level, 125)
    for task, level in (
        *(("arithmetic", "2"), ("arithmetic", "4")),
        *(("rearrangement", "2"), ("rearrangement", "5")),
    )
)
RECALLING = (
    TaskPlan(make_task("needle"), "1024", 250),
    TaskPlan(make_task("multi-key"), "1024", 250),
)
SAMPLED = tuple(
    TaskPlan(make_task("countdown"), level, 50, temperature=TEMPERATURE)
    for level in ("3 sums", "4 sums")
)


@dataclass(frozen=True)
class Case:
    """A configuration beside the one that it was made of: mean scores and their difference."""

    name: str
    items: int
    means: tuple[float, float]
    difference: Difference


def scores(llm: LLM, plans: Sequence[TaskPlan], sampling_seed: int = 0) -> list[float]:
    """Return the scores of all problems; the problems are always the same."""
    return [s for plan in plans for s in run_task(llm, plan, 0, sampling_seed).scores]


def compare(
    name: str, plans: Sequence[TaskPlan], whole: Callable[[], LLM], broken: Callable[[], LLM]
) -> Case:
    """Put problems to both."""
    sides = []
    for load in (whole, broken):
        with load() as llm:
            sides.append(scores(llm, plans))
    means = (mean_estimate(sides[0]).mean, mean_estimate(sides[1]).mean)
    return Case(name, len(sides[0]), means, paired_difference(sides[0], sides[1]))


def broken_cases() -> list[Case]:
    """Return the two that must lose."""
    base, long = str(MODELS / "base"), str(MODELS / "long")
    with tempfile.TemporaryDirectory() as directory:
        rounded = Path(directory)
        round_checkpoint(MODELS / "base", rounded, 2)
        first = compare(
            "base, weights rounded to 2 bits", COMPUTING, lambda: LLM(base), lambda: LLM(directory)
        )
    second = compare(
        "long, three quarters of the pages evicted at random",
        RECALLING,
        lambda: LLM(long),
        lambda: LLM(long, kv="random-eviction:keep=0.25"),
    )
    return [first, second]


def self_comparisons() -> list[Difference]:
    """Return what comes of comparing reason with itself, each time with draws of its own."""
    found = []
    with LLM(str(MODELS / "reason")) as llm:
        for number in range(REPEATS):
            sides = [scores(llm, SAMPLED, 2 * number + side) for side in (1, 2)]
            found.append(paired_difference(sides[0], sides[1]))
    return found


def report(cases: Sequence[Case], repeats: Sequence[Difference]) -> str:
    """Return the findings as a part of a page."""
    lines = [
        "| configuration | problems | whole | broken | difference | p |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        change = case.difference.estimate
        lines.append(
            f"| {case.name} | {case.items} | {case.means[0]:.3f} | {case.means[1]:.3f} | "
            f"{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}) | "
            f"{case.difference.p_value:.4f} |"
        )
    significant = sum(each.is_significant for each in repeats)
    items = sum(plan.count for plan in SAMPLED)
    said = (
        f"Reason, compared with itself at temperature {TEMPERATURE} on {items} problems with other "
        f"draws: {significant} of {len(repeats)} comparisons differ at the 5 % level."
    )
    return "\n".join([*lines, "", said]) + "\n"


def main() -> None:
    """Print the findings, and every p-value."""
    cases, repeats = broken_cases(), self_comparisons()
    print(report(cases, repeats))
    print(json.dumps([asdict(each) for each in repeats]))


if __name__ == "__main__":
    main()
