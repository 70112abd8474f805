"""The prompts of one HTTP request, generated together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from headrace.contracts.outputs import RequestOutput
from headrace.contracts.sampling import SamplingParams
from headrace.errors import GenerationError
from headrace.server.metrics import ServerMetrics
from headrace.server.responses import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from headrace.llm import AsyncLLM

Changes = dict[int, RequestOutput]
"""Prompt number -> its live output, for those that changed since the last time."""


class Generation:
    """Runs every prompt of a request; they succeed together or the first failure ends all.

    Args:
        request_id: of the HTTP request; its prompts are numbered below it.
        prompts: token ids.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        metrics: ServerMetrics,
        request_id: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        priority: int,
    ) -> None:
        self._llm = llm
        self._metrics = metrics
        self._request_id = request_id
        self._prompts = prompts
        self._params = params
        self._priority = priority
        self.outputs: Changes = {}

    async def changes(self) -> AsyncGenerator[Changes, None]:
        """Yield what changed until every prompt has finished.

        Closing it early aborts what still runs.

        Raises:
            HeadraceError: what the first failing prompt raised; the others are aborted.
        """
        try:
            streams = [self._stream(i) for i in range(len(self._prompts))]
            async with aclosing(merge(streams)) as merged:
                async for changes in merged:
                    self.outputs.update(changes)
                    for output in changes.values():
                        if output.finished:
                            self._metrics.observe(output)
                    yield changes
        except GenerationError:
            self._observe_cut("error")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._observe_cut("abort")
            raise

    async def results(self) -> list[RequestOutput]:
        """Wait for every prompt and return their outputs in order."""
        async with aclosing(self.changes()) as changes:
            async for _ in changes:
                pass
        return [self.outputs[i] for i in range(len(self._prompts))]

    def usage(self) -> Usage:
        """Tokens in and out so far, of all prompts."""
        outputs = self.outputs.values()
        prompt = sum(len(ids) for ids in self._prompts)
        generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        cached = sum(o.metrics.num_cached_tokens for o in outputs if o.metrics is not None)
        return Usage(prompt, generated, prompt + generated, PromptTokensDetails(cached))

    def _stream(self, index: int) -> AsyncGenerator[RequestOutput, None]:
        return self._llm.generate(
            self._prompts[index],
            self._params,
            f"{self._request_id}-{index}",
            priority=self._priority,
        )

    def _observe_cut(self, reason: str) -> None:
        finished = sum(output.finished for output in self.outputs.values())
        self._metrics.observe_cut(reason, (len(self._prompts) - finished) * self._params.n)


async def merge(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[Changes, None]:
    """Iterate over several streams at once, closing all of them at the end.

    Outputs are live and cumulative, so a reader that falls behind gets the newest state once
    rather than a queue of old ones.

    Raises:
        Exception: what the first failing stream raised.
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
        ended = 0
        while ended < len(tasks):
            await wake.wait()
            wake.clear()
            ended = sum(_succeeded(task) for task in tasks)
            if changed:
                taken = changed.copy()
                changed.clear()
                yield taken
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _succeeded(task: asyncio.Task[None]) -> bool:
    """Whether the task has ended. Raises what it raised."""
    if not task.done():
        return False
    task.result()
    return True
