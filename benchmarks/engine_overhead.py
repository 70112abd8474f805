"""What the engine adds to the model's work in a step of 16 decoding rows.

    python benchmarks/engine_overhead.py

Scheduling, batch building, bookkeeping with detokenization, and results put together are timed
step by step. What streaming to 16 consumers adds is the processor time of their event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median

from harness import Result, parser, prompts

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.cli.bench.steps import median_times, run_steps

ROWS, INPUT = 16, 64


def sampled(tokens: int) -> SamplingParams:
    """Requests that exercise the sampler, all of one length."""
    return SamplingParams(max_tokens=tokens, temperature=0.8, top_p=0.95, seed=1, ignore_eos=True)


def step_times(model: str | None, rounds: int, tokens: int) -> list[dict[str, float]]:
    """Median times of the parts of a step in which all rows decode, one per round."""
    medians = []
    with LLM(model) as llm:
        for number in range(rounds + 1):
            _, steps = run_steps(llm, prompts(ROWS, INPUT, seed=number), sampled(tokens))
            decoding = steps[-(tokens // 2) : -1]
            medians.append(median_times(decoding))
    return medians[1:]


async def consume(llm: AsyncLLM, prompt: list[int], tokens: int) -> None:
    """Take every update as a server would: the new piece of text."""
    shown = 0
    async for output in llm.generate(prompt, sampled(tokens)):
        text = output.outputs[0].text
        shown += len(text[shown:])


def streaming_time(model: str | None, rounds: int, tokens: int) -> list[float]:
    """Processor seconds of the consumers' event loop per step, one figure per round."""
    figures = []
    llm = AsyncLLM(model)
    with asyncio.Runner() as runner:

        async def all_at_once(inputs: Sequence[list[int]]) -> None:
            await asyncio.gather(*(consume(llm, prompt, tokens) for prompt in inputs))

        for number in range(rounds + 1):
            steps, start = llm.stats().steps, time.thread_time()
            runner.run(all_at_once(prompts(ROWS, INPUT, seed=number)))
            figures.append((time.thread_time() - start) / (llm.stats().steps - steps))
    llm.close()
    return figures[1:]


def measure(model: str | None, rounds: int, tokens: int) -> Result:
    """All parts, in milliseconds per step."""
    times = step_times(model, rounds, tokens)
    streaming = [1000 * seconds for seconds in streaming_time(model, rounds, tokens)]
    parts = {name: 1000 * median(each[name] for each in times) for name in times[0]}
    names = {
        "plan": "scheduling",
        "batch": "batch building",
        "commit": "bookkeeping and detokenization",
        "output": "results put together",
    }
    known = sum(parts[name] for name in names)
    rest = parts["overhead"] - known
    return Result(
        f"a step of {ROWS} decoding rows: ms, medians of {rounds} rounds",
        ["", "ms"],
        [
            *([title, parts[name]] for name, title in names.items()),
            ["between these", rest],
            ["streaming to consumers", median(streaming)],
            ["engine in all", parts["overhead"] + median(streaming)],
            ["sampler, apart (temperature and top-p)", parts["sample"]],
            ["model, apart", parts["forward"]],
        ],
        {"steps": times, "streaming_ms": streaming},
    )


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--model", help="default: the embedded model")
    made.add_argument("--tokens", type=int, default=128, help="steps of a round (default: 128)")
    arguments = made.parse_args()
    measure(arguments.model, arguments.rounds, arguments.tokens).print(arguments.json)
