"""What methods cost in quality: the same text and problems for all sides, item by item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import progress

from cards.measuring import estimated
from headrace import LLM
from headrace.evaluation.evaluation import Subject
from headrace.evaluation.held_out import held_out_texts
from headrace.evaluation.language import (
    TOP,
    Scored,
    Window,
    divergences,
    loss_estimate,
    score_windows,
    text_windows,
)
from headrace.evaluation.measured import PLAIN, Measurement
from headrace.evaluation.statistics import mean_estimate, paired_difference
from headrace.evaluation.task_run import TaskPlan, choose_problems, score_problems

OTHERS = {"random-eviction": "random pages"}
"""Methods that every one of their kind has to beat, as tables call them."""


@dataclass(frozen=True, slots=True)
class Side:
    """A method with its options, on a model.

    Args:
        options: "NAME:OPTION=VALUE,...".
    """

    options: str

    @property
    def name(self) -> str:
        """Of the method."""
        return self.options.partition(":")[0]

    def open(self, model: Path, **engine: Any) -> LLM:
        """An engine with it."""
        return Subject(
            self.options, {"model": str(model), "methods": (self.options,), **engine}
        ).open()


def open_plain(model: Path, **engine: Any) -> LLM:
    """An engine without methods."""
    return LLM(str(model), **engine)


def beside(values: Mapping[str, float], own: Side) -> dict[str, float]:
    """Plain, and what every method of the kind has to beat; by labels.

    Args:
        values: options of a side -> its value; that without a method is ``PLAIN``.
    """
    found = {PLAIN: values[PLAIN]}
    for options, value in values.items():
        label = OTHERS.get(options.partition(":")[0])
        if label is not None and options.partition(":")[0] != own.name:
            found[label] = value
    return found


def code_prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out modules, ``length`` tokens each, as evenly taken as they last."""
    found: list[list[int]] = []
    encoded = [llm.tokenizer.encode(text) for text in held_out_texts().values()]
    for start in range(0, max(map(len, encoded)), length):
        for ids in encoded:
            if len(ids) >= start + length and len(found) < count:
                found.append(ids[start : start + length])
    return found


def compare_text(
    model: tuple[Path, str], sides: Sequence[Side], window: int, tokens: int
) -> dict[str, list[Measurement]]:
    """Perplexity on held-out text, and divergence from the plain engine; by method."""
    directory, label = model
    scored: dict[str, list[Scored]] = {}
    windows: list[Window] = []
    with open_plain(directory) as llm:
        windows = text_windows(llm, window, tokens)
        scored[PLAIN] = score_windows(llm, windows, TOP)
    for side in sides:
        progress(f"  text: {side.options}")
        with side.open(directory) as llm:
            scored[side.options] = score_windows(llm, windows, TOP)
    counts = [float(len(each.counted)) for each in windows]
    losses = {
        key: [each.loss / count for each, count in zip(found, counts, strict=True)]
        for key, found in scored.items()
    }
    apart = {key: divergences(scored[PLAIN], found) for key, found in scored.items()}
    means = {key: mean_estimate(values, counts).mean for key, values in apart.items()}
    perplexities = {
        key: math.exp(loss_estimate(windows, found).mean) for key, found in scored.items()
    }
    rows: dict[str, list[Measurement]] = {}
    sample = f"{len(windows)} texts, {int(sum(counts)):,} tokens"
    for side in sides:
        loss = loss_estimate(windows, scored[side.options])
        p_value = paired_difference(losses[PLAIN], losses[side.options]).p_value
        about: dict[str, Any] = {"model": label, "options": side.options}
        rows.setdefault(side.name, []).extend(
            [
                estimated(
                    "KL divergence from plain, nats a token",
                    mean_estimate(apart[side.options], counts),
                    sample,
                    beside=beside(means, side),
                    **about,
                ),
                Measurement(
                    f"perplexity, windows of {window} tokens",
                    perplexities[side.options],
                    sample,
                    low=math.exp(loss.low),
                    high=math.exp(loss.high),
                    beside=beside(perplexities, side),
                    p_value=p_value,
                    **about,
                ),
            ]
        )
    return rows


def compare_tasks(
    model: tuple[Path, str],
    sides: Sequence[Side],
    plans: Sequence[TaskPlan],
    claim: str = "",
    **engine: Any,
) -> dict[str, list[Measurement]]:
    """Scores of the same problems, by method. ``engine``: options of all engines."""
    directory, label = model
    scores: dict[str, list[list[float]]] = {}
    problems = [choose_problems(plan, 0) for plan in plans]
    for options in (PLAIN, *(side.options for side in sides)):
        progress(f"  problems: {options}")
        opening = open_plain if options == PLAIN else Side(options).open
        with opening(directory, **engine) as llm:
            for plan, given in zip(plans, problems, strict=True):
                result = score_problems(llm, plan, given)
                if result.skipped:
                    raise RuntimeError(f"{plan.name}: {result.skipped}")
                scores.setdefault(options, []).append(result.scores)
    rows: dict[str, list[Measurement]] = {}
    for side in sides:
        for number, plan in enumerate(plans):
            own, plain = scores[side.options][number], scores[PLAIN][number]
            means = {key: mean_estimate(found[number]).mean for key, found in scores.items()}
            rows.setdefault(side.name, []).append(
                estimated(
                    f"{plan.name}: score",
                    mean_estimate(own),
                    f"{len(own)} problems",
                    beside=beside(means, side),
                    p_value=paired_difference(plain, own).p_value,
                    claim=claim,
                    model=label,
                    options=side.options,
                )
            )
    return rows
