"""How much sooner a second request with the same long prefix reaches its first token.

python benchmarks/prefix_caching.py
"""

from __future__ import annotations

from statistics import median

from harness import Result, parser, prompts

from headrace import LLM, SamplingParams
from headrace.cli.timing import Timing

PREFIX, SUFFIX = 2000, 16


def compare(model: str | None, rounds: int) -> Result:
    """Time pairs of requests; every pair has a prefix of its own."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    first: list[float] = []
    second: list[float] = []
    with LLM(model, max_model_len=PREFIX + SUFFIX + 1) as llm:
        llm.generate(prompts(1, PREFIX + SUFFIX, seed=-1), params)
        for number in range(rounds):
            prefix, *suffixes = (
                prompts(1, length, seed=3 * number + i)[0]
                for i, length in enumerate((PREFIX, SUFFIX, SUFFIX))
            )
            for times, suffix in zip((first, second), suffixes, strict=True):
                output = llm.generate([prefix + suffix], params)[0]
                times.append(Timing.of(output).time_to_first_token * 1000)
        name = llm.model_info.name
    return Result(
        f"{name}: time to first token, {PREFIX} tokens of shared prefix, medians of {rounds} pairs",
        ["", "ms"],
        [
            ["first request", median(first)],
            ["second request", median(second)],
            ["ratio", median(first) / median(second)],
        ],
        {"first_ms": first, "second_ms": second},
    )


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--model", help="default: the embedded model")
    arguments = made.parse_args()
    compare(arguments.model, arguments.rounds).print(arguments.json)
