"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from headrace.contracts.outputs import CompletionOutput, RequestOutput
from headrace.errors import GenerationError
from headrace.server.generation import merge

CLOSED: list[str] = []


async def stream(name: str, count: int, failure: str = "") -> AsyncGenerator[RequestOutput, None]:
    """A live output that grows ``count`` times and then ends, or fails."""
    output = RequestOutput(name, None, [], [CompletionOutput(0)])
    try:
        for token in range(count):
            await asyncio.sleep(0)
            output.outputs[0].token_ids.append(token)
            yield output
        if failure:
            raise GenerationError(failure)
    finally:
        CLOSED.append(name)


@pytest.fixture(autouse=True)
def _nothing_is_closed_yet() -> None:
    CLOSED.clear()


@pytest.mark.parametrize("counts", [[5], [5, 0, 3]])
def test_every_stream_is_read_to_its_end(counts: list[int]) -> None:
    async def lengths() -> list[int]:
        found = [0] * len(counts)
        async for changes in merge([stream(str(i), n) for i, n in enumerate(counts)]):
            for index, output in changes.items():
                assert output.request_id == str(index)
                assert len(output.outputs[0].token_ids) > found[index]
                found[index] = len(output.outputs[0].token_ids)
        return found

    assert asyncio.run(lengths()) == counts
    assert sorted(CLOSED) == [str(i) for i in range(len(counts))]


def test_a_reader_that_falls_behind_gets_the_newest_state_once() -> None:
    async def rounds() -> int:
        count = 0
        async for _ in merge([stream("a", 1000), stream("b", 1000)]):
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(rounds()) < 1000


@pytest.mark.parametrize("others", [0, 2])
def test_the_first_failure_ends_all(others: int) -> None:
    async def read() -> None:
        streams = [stream(str(i), 10**9) for i in range(others)]
        async for _ in merge([*streams, stream("x", 2, "no")]):
            pass

    with pytest.raises(GenerationError, match="no"):
        asyncio.run(read())
    assert len(CLOSED) == others + 1


@pytest.mark.parametrize("count", [1, 3])
def test_closing_early_closes_every_stream(count: int) -> None:
    async def read() -> None:
        async with aclosing(merge([stream(str(i), 10**9) for i in range(count)])) as changes:
            async for _ in changes:
                break

    asyncio.run(read())
    assert len(CLOSED) == count
