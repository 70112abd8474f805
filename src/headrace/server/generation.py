"""The outputs of several prompts as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from headrace.contracts.outputs import RequestOutput

T = TypeVar("T")

Changes = dict[int, RequestOutput]
"""Prompt number -> its live output, for those that changed since the last time."""


async def collect(changes: AsyncGenerator[Changes, None]) -> list[RequestOutput]:
    """Wait for every prompt and return their outputs in order."""
    outputs: Changes = {}
    async with aclosing(changes):
        async for changed in changes:
            outputs.update(changed)
    return [outputs[prompt] for prompt in sorted(outputs)]


async def merge(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[Changes, None]:
    """Iterate over several streams at once, closing all of them at the end.

    Outputs are live and cumulative, so a reader that falls behind gets the newest state once
    rather than a queue of old ones. Raises what the first failing stream raised.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield {0: output}
        return
    changed: Changes = {}
    wake = asyncio.Event()

    async def follow(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        async with aclosing(stream):
            async for output in stream:
                changed[index] = output
                wake.set()

    tasks = [asyncio.create_task(follow(i, stream)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(lambda _: wake.set())
    try:
        running = True
        while running:
            await wake.wait()
            wake.clear()
            for task in tasks:
                if task.done():
                    task.result()
            running = not all(task.done() for task in tasks)
            if changed:
                taken = changed.copy()
                changed.clear()
                yield taken
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gather(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all jobs in order; the first that fails ends the others."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
