"""How much sooner a second request with the same long prefix reaches its first token."""

from __future__ import annotations

from statistics import median

from harness import Result

from headrace import LLM, SamplingParams
from headrace.cli.bench.engine import random_prompts
from headrace.cli.timing import timing

PREFIX, SUFFIX = 2000, 16


def measure(rounds: int, quick: bool) -> Result:
    """Time pairs of requests to the embedded model; every pair has a prefix of its own."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    pairs = []
    with LLM(max_model_len=PREFIX + SUFFIX + 1) as llm:
        for number in range(rounds + 1):
            pair = random_prompts(2, PREFIX + SUFFIX, 4000, shared=PREFIX, seed=number)
            figures = [timing(llm.generate([prompt], params)[0]) for prompt in pair]
            pairs.append([1000 * each["time_to_first_token"] for each in figures])
    first, second = zip(*pairs[1:], strict=True)
    return Result(
        f"embedded model: time to first token, {PREFIX} tokens of shared prefix, medians of "
        f"{rounds} pairs",
        ["", "ms"],
        [
            ["first request", median(first)],
            ["second request", median(second)],
            ["ratio", median(first) / median(second)],
        ],
        {"first_ms": first, "second_ms": second},
    )
