"""Two configurations on the same work, in one run, in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from headrace.contracts.sampling import SamplingParams
from headrace.errors import InvalidRequestError
from headrace.evaluation.evaluation import Subject
from headrace.evaluation.language import score_windows, text_windows
from headrace.evaluation.statistics import mean_estimate, paired_difference
from headrace.evaluation.suite import Suite
from headrace.evaluation.task_run import TaskPlan, choose_problems, score_problems
from headrace.llm import LLM

PART = 25
"""Problems that one side is given before it is the other's turn."""
SPEED_PROMPT, SPEED_OUTPUT, SPEED_ROUNDS = 512, 32, 5
BATCHES = (1, 8)

Notify = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of one side.

    Args:
        first_token: seconds from handing in a prompt alone to its first token.
        tokens: batch -> tokens decoded per second.
    """

    first_token: float
    tokens: dict[int, float]


class Comparison:
    """Puts a suite and a timing to two subjects that are loaded at once.

    Args:
        samples: completions of each problem; greedy ones where ``temperature`` is 0.
        sampling_seeds: of the two sides' draws. The same seed gives two equal engines equal draws.
    """

    def __init__(
        self,
        first: Subject,
        second: Subject,
        suite: Suite,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        sampling_seeds: tuple[int, int] = (0, 0),
        notify: Notify | None = None,
    ) -> None:
        self._subjects = (first, second)
        self._suite, self._seed = suite, seed
        self._temperature, self._sampling_seeds = temperature, sampling_seeds
        self._notify = notify or (lambda done, total, name: None)

    def run(self) -> dict[str, Any]:
        """Measure everything; differences are the second's minus the first's."""
        first, second = self._subjects
        with first.open() as one, second.open() as other:
            sides = (one, other)
            rows = []
            total = len(self._suite.plans) + 2
            self._notify(0, total, "text")
            rows.append(self._compare_text(sides))
            for number, plan in enumerate(self._suite.plans, 1):
                self._notify(number, total, plan.name)
                rows.append(self._compare_task(sides, plan))
            self._notify(total - 1, total, "speed")
            speeds = self._compare_speed(sides)
            memory = [
                {
                    "weight_bytes": llm.model_info.weight_bytes,
                    "kv_peak_bytes": llm.stats().pages_peak * llm.model_info.page_bytes,
                }
                for llm in sides
            ]
        return {
            "subjects": [first.label, second.label],
            "rows": rows,
            "speeds": [asdict(speed) for speed in speeds],
            "memory": memory,
        }

    def _compare_text(self, sides: Sequence[LLM]) -> dict[str, Any]:
        length = min(self._suite.window, *(llm.model_info.max_model_len for llm in sides))
        windows = text_windows(sides[0], length, self._suite.tokens)
        losses: list[list[float]] = [[], []]
        for part in _parts(len(windows)):
            for side, llm in _turns(sides, part.start // PART):
                try:
                    scored = score_windows(llm, windows[part])
                except InvalidRequestError as error:
                    return {"measure": "loss, nats a token", "skipped": str(error)}
                counts = [len(window.counted) for window in windows[part]]
                losses[side] += [s.loss / n for s, n in zip(scored, counts, strict=True)]
        return _row("loss, nats a token", losses)

    def _compare_task(self, sides: Sequence[LLM], plan: TaskPlan) -> dict[str, Any]:
        plan = TaskPlan(plan.task, plan.level, plan.count, plan.agnostic, 1, self._temperature)
        problems = choose_problems(plan, self._seed)
        scores: list[list[float]] = [[], []]
        for part in _parts(len(problems)):
            for side, llm in _turns(sides, part.start // PART):
                seed = self._sampling_seeds[side]
                result = score_problems(llm, plan, problems[part], seed, part.start)
                if result.skipped:
                    return {"measure": plan.name, "skipped": result.skipped}
                scores[side] += result.scores
        return _row(plan.name, scores)

    def _compare_speed(self, sides: Sequence[LLM]) -> list[Speed]:
        source = random.Random(self._seed)
        firsts: list[list[float]] = [[], []]
        rates: list[dict[int, list[float]]] = [{b: [] for b in BATCHES} for _ in sides]
        for number in range(SPEED_ROUNDS + 1):  # the first one warms up
            for side, llm in _turns(sides, number):
                for batch in BATCHES:
                    first, rate = _time(llm, batch, source)
                    if number and batch == 1:
                        firsts[side].append(first)
                    if number:
                        rates[side][batch].append(rate)
        return [
            Speed(median(firsts[side]), {b: median(rates[side][b]) for b in BATCHES})
            for side in range(len(sides))
        ]


def _parts(count: int) -> list[slice]:
    ends = [*range(0, count, PART), count]
    return [slice(start, end) for start, end in pairwise(ends)]


def _turns(sides: Sequence[LLM], number: int) -> list[tuple[int, LLM]]:
    """Both sides, who begins alternating."""
    order = list(enumerate(sides))
    return order[::-1] if number % 2 else order


def _time(llm: LLM, batch: int, source: random.Random) -> tuple[float, float]:
    """Seconds to the first token, and tokens decoded per second, of new random prompts."""
    info = llm.model_info
    length = min(SPEED_PROMPT, info.max_model_len - SPEED_OUTPUT)
    low = min(300, info.vocab_size // 2)
    prompts = [source.choices(range(low, info.vocab_size), k=length) for _ in range(batch)]
    params = SamplingParams(
        max_tokens=SPEED_OUTPUT, temperature=0.0, ignore_eos=True, detokenize=False
    )
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    end = time.perf_counter() - started
    spans = []
    for output in outputs:
        metrics = output.metrics
        assert metrics is not None and metrics.finished_time and metrics.first_token_time
        spans.append(metrics.finished_time - metrics.first_token_time)
    return end - max(spans), batch * (SPEED_OUTPUT - 1) / max(spans)


def _row(name: str, values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Both means, and the paired difference."""
    difference = paired_difference(values[0], values[1])
    return {
        "measure": name,
        "items": len(values[0]),
        "means": [asdict(mean_estimate(side)) for side in values],
        "difference": asdict(difference.estimate),
        "p_value": difference.p_value,
        "significant": difference.is_significant,
    }
