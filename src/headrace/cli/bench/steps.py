"""Runs requests step by step and notes where the time of each step goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from headrace.contracts.outputs import RequestOutput
from headrace.contracts.sampling import SamplingParams

if TYPE_CHECKING:
    from headrace.llm import LLM

COMPUTING = ("forward", "sample")
"""Parts of a step that are the model's work; all others are overhead."""

StepTimes = dict[str, float]
"""Part -> seconds. The engine's own parts, "output" (results put together) and "total"."""


def run_steps(
    llm: LLM, prompts: Iterable[list[int]], params: SamplingParams
) -> tuple[list[RequestOutput], list[StepTimes]]:
    """What ``LLM.generate`` does, with a stopwatch: the results, and the times of every step."""
    from headrace.request_output import OutputBuilder

    engine, token_text = llm.engine, llm.tokenizer.token_text
    builders: dict[str, OutputBuilder] = {}
    pending = deque((f"bench-{index}", prompt) for index, prompt in enumerate(prompts))
    steps: list[StepTimes] = []
    while pending or engine.has_unfinished_requests:
        while pending and not engine.queue_is_full:
            request_id, prompt = pending.popleft()
            builders[request_id] = OutputBuilder(request_id, None, prompt, params, token_text)
            engine.add_request(request_id, prompt, params)
        start = time.perf_counter()
        updates = engine.step()
        stepped = time.perf_counter()
        for update in updates:
            builders[update.request_id].apply(update)
        end = time.perf_counter()
        steps.append({**engine.timings, "output": end - stepped, "total": end - start})
    return [builder.output for builder in builders.values()], steps


def median_times(steps: Sequence[StepTimes]) -> StepTimes:
    """Part -> median seconds; "overhead" is everything that is not the model's work."""
    parts = {name: median(step[name] for step in steps) for name in steps[0]}
    overhead = median(step["total"] - sum(step[name] for name in COMPUTING) for step in steps)
    return {**parts, "overhead": overhead}
