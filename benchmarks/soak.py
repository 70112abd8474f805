"""Load an engine without a pause, abort a fifth of the requests, and watch its memory.

    python benchmarks/soak.py --minutes 30

The queue is never empty: clients outnumber the sequences of a step. After the run everything is
drained, and no page may be left in use. Resident memory is sampled every two seconds; its slope is
taken over the last two thirds, when caches are warm.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from headrace import AsyncLLM, SamplingParams
from headrace.cli.output import report

SEQUENCES, CLIENTS = 16, 40
ABORTED = 0.2
SAMPLE_SECONDS = 2.0


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def client(llm: AsyncLLM, number: int, until: float, counts: dict[str, int]) -> None:
    """Send one request after another; leave every fifth before it is finished."""
    draw = random.Random(number)
    while time.monotonic() < until:
        prompt = [draw.randrange(3, 4000) for _ in range(draw.randrange(8, 400))]
        tokens = draw.randrange(4, 96)
        leave = draw.randrange(tokens) if draw.random() < ABORTED else None
        params = SamplingParams(
            max_tokens=tokens, temperature=1.0, top_p=0.95, ignore_eos=True, seed=number
        )
        stream = llm.generate(prompt, params)
        try:
            async for output in stream:
                if leave is not None and len(output.outputs[0].token_ids) > leave:
                    break
        finally:
            await stream.aclose()
        counts["aborted" if leave is not None else "finished"] += 1


async def watch(
    until: float, samples: list[tuple[float, int]], least: list[int], llm: AsyncLLM
) -> None:
    """Sample memory and the length of the queue."""
    start = time.monotonic()
    while time.monotonic() < until:
        await asyncio.sleep(SAMPLE_SECONDS)
        samples.append(((time.monotonic() - start) / 60, resident_bytes()))
        if time.monotonic() < until:  # after that the clients leave
            least[0] = min(least[0], llm.stats().waiting)
        if len(samples) % 30 == 0:
            print(f"{samples[-1][0]:.0f} min, {samples[-1][1] / 1e6:.1f} MB", file=sys.stderr)


async def soak(minutes: float, options: dict[str, Any]) -> dict[str, float]:
    """Run the load and return its figures."""
    llm = AsyncLLM(max_num_seqs=SEQUENCES, kv_cache_memory_bytes=64 << 20, seed=0, **options)
    until = time.monotonic() + 60 * minutes
    counts = {"finished": 0, "aborted": 0}
    samples: list[tuple[float, int]] = []
    least = [CLIENTS]
    try:
        await asyncio.gather(
            watch(until, samples, least, llm),
            *(client(llm, number, until, counts) for number in range(CLIENTS)),
        )
        await llm.drain(60)
        left = llm.stats()
    finally:
        llm.close()
    steady = np.array([sample for sample in samples if sample[0] >= minutes / 3])
    slope = float(np.polyfit(steady[:, 0], steady[:, 1] / 1e6, 1)[0])
    return {
        "minutes": minutes,
        "requests finished": counts["finished"],
        "requests aborted": counts["aborted"],
        "shortest queue": least[0],
        "preemptions": left.preemptions,
        "pages left in use": left.pages_used,
        "resident memory at the end, MB": samples[-1][1] / 1e6,
        "slope over the last two thirds, MB/min": slope,
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--weights", default="w4a8")
    parser.add_argument("--kv-cache-dtype", default="int8")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = {
        "num_threads": arguments.threads,
        "weights": arguments.weights,
        "kv_cache_dtype": arguments.kv_cache_dtype,
    }
    figures = asyncio.run(soak(arguments.minutes, options))
    report(figures, ("soak", ("", "value"), list(figures.items())), as_json=arguments.json)


if __name__ == "__main__":
    main()
