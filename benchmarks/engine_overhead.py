"""What the engine adds to the model's work in a step of 16 decoding rows.

Scheduling, batch building, bookkeeping with detokenization, and results put together are timed
step by step. What streaming to 16 consumers adds is the processor time of their event loop.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median

from harness import Result

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.cli.bench.engine import median_times, random_prompts, run_steps

ROWS, INPUT = 16, 64
PARTS = {
    "plan": "scheduling",
    "batch": "batch building",
    "commit": "bookkeeping and detokenization",
    "output": "results put together",
}


def sampled(tokens: int) -> SamplingParams:
    """Requests that exercise the sampler, all of one length."""
    return SamplingParams(max_tokens=tokens, temperature=0.8, top_p=0.95, seed=1, ignore_eos=True)


def step_times(rounds: int, tokens: int) -> list[dict[str, float]]:
    """Median times of the parts of a step in which all rows decode, one per round."""
    medians = []
    with LLM() as llm:
        for number in range(rounds + 1):
            prompts = random_prompts(ROWS, INPUT, 4000, seed=number)
            _, steps = run_steps(llm, prompts, sampled(tokens))
            medians.append(median_times(steps[-(tokens // 2) : -1]))
    return medians[1:]


async def consume(llm: AsyncLLM, prompt: list[int], tokens: int) -> None:
    """Take every update as a server would: the new piece of text."""
    shown = 0
    async for output in llm.generate(prompt, sampled(tokens)):
        text = output.outputs[0].text
        shown += len(text[shown:])


def streaming_times(rounds: int, tokens: int) -> list[float]:
    """Processor seconds of the consumers' event loop per step, one figure per round."""
    figures = []
    llm = AsyncLLM()

    async def one_round(number: int) -> None:
        steps, start = llm.stats().steps, time.thread_time()
        prompts = random_prompts(ROWS, INPUT, 4000, seed=number)
        await asyncio.gather(*(consume(llm, prompt, tokens) for prompt in prompts))
        figures.append((time.thread_time() - start) / (llm.stats().steps - steps))

    with asyncio.Runner() as runner:
        for number in range(rounds + 1):
            runner.run(one_round(number))
    llm.close()
    return figures[1:]


def measure(rounds: int, quick: bool) -> Result:
    """All parts on the embedded model, in milliseconds per step."""
    tokens = 12 if quick else 128
    times = step_times(rounds, tokens)
    streaming = [1000 * seconds for seconds in streaming_times(rounds, tokens)]
    parts = {name: 1000 * median(each[name] for each in times) for name in times[0]}
    return Result(
        f"a step of {ROWS} decoding rows: ms, medians of {rounds} rounds",
        ["", "ms"],
        [
            *([title, parts[name]] for name, title in PARTS.items()),
            ["between these", parts["overhead"] - sum(parts[name] for name in PARTS)],
            ["streaming to consumers", median(streaming)],
            ["engine in all", parts["overhead"] + median(streaming)],
            ["sampler, apart (temperature and top-p)", parts["sample"]],
            ["model, apart", parts["forward"]],
        ],
        {"steps": times, "streaming_ms": streaming},
    )
