"""``AsyncLLM``: streams, cancellation, overload, draining and closing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from headrace import AsyncLLM, SamplingParams
from headrace.contracts.outputs import RequestOutput
from headrace.errors import (
    EngineClosedError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
)
from tests.llm.conftest import MakeAsyncLLM, MakeLLM, check_idle

PROMPT = list(range(64, 84))
LONG = 900
"""More tokens than any test waits for."""


def greedy(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False, **options
    )


async def complete(llm: AsyncLLM, prompt: Any = PROMPT, *arguments: Any) -> RequestOutput:
    """The last output of a request."""
    return [output async for output in llm.generate(prompt, *arguments)][-1]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine's thread is about to do."""
    while not condition():
        await asyncio.sleep(0.005)


async def idle(llm: AsyncLLM) -> None:
    """Wait until nothing runs; then no page may be in use."""
    await until(lambda: not llm.engine.has_unfinished_requests)
    check_idle(llm.engine)
    assert not llm._streams


# -- streams --------------------------------------------------------------------------------


def test_outputs_grow_to_what_the_offline_engine_gives(
    make_async_llm: MakeAsyncLLM, make_llm: MakeLLM
) -> None:
    llm = make_async_llm()
    params = SamplingParams(max_tokens=20, seed=4, n=2, logprobs=1, prompt_logprobs=0)

    async def stream() -> tuple[list[list[int]], RequestOutput]:
        lengths = []
        texts = ["", ""]
        async for output in llm.generate("import os\n", params):
            lengths.append([len(c.token_ids) for c in output.outputs])
            for completion in output.outputs:
                assert completion.text.startswith(texts[completion.index])
                texts[completion.index] = completion.text
                assert completion.logprobs is not None
                assert len(completion.logprobs) == len(completion.token_ids)
        await idle(llm)
        return lengths, output

    lengths, output = asyncio.run(stream())
    assert lengths == sorted(lengths) and len(lengths) > 5
    assert output.finished and all(c.finished() for c in output.outputs)
    (offline,) = make_llm().generate("import os\n", params)
    assert output.outputs == offline.outputs
    assert output.prompt_logprobs == offline.prompt_logprobs
    assert output.prompt_token_ids == offline.prompt_token_ids


def test_requests_share_steps(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def together() -> list[RequestOutput]:
        return await asyncio.gather(*(complete(llm, [64 + i, 65], greedy(32)) for i in range(8)))

    outputs = asyncio.run(together())
    assert all(len(output.outputs[0].token_ids) == 32 for output in outputs)
    assert llm.stats().steps < 8 * 32 / 2


def test_defaults_are_the_models(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()
    output = asyncio.run(complete(llm, "import os\n"))
    limit = llm.default_sampling_params().max_tokens
    assert limit is not None and 1 <= len(output.outputs[0].token_ids) <= limit


def test_check_gives_the_tokens_of_a_prompt(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()
    ids = llm.check("import os\n", greedy())
    assert ids == llm.tokenizer.encode("import os\n") == llm.check(ids, greedy())


def test_nothing_asked_is_answered(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()
    output = asyncio.run(complete(llm, PROMPT, greedy(0)))
    assert output.finished and output.outputs[0].finish_reason == "length"


# -- giving up ------------------------------------------------------------------------------


def test_closing_a_stream_frees_its_pages(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def give_up() -> None:
        async with aclosing(llm.generate(PROMPT, greedy(LONG, n=3))) as stream:
            async for output in stream:
                if len(output.outputs[0].token_ids) >= 3:
                    break
        await idle(llm)

    asyncio.run(give_up())
    assert llm.stats().aborted == 1
    assert llm.stats().generation_tokens < LONG


def test_leaving_a_loop_without_closing_frees_pages_too(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def leave() -> None:
        async for _ in llm.generate(PROMPT, greedy(LONG)):
            break

    async def main() -> None:
        await leave()
        await idle(llm)

    asyncio.run(main())
    assert llm.stats().aborted == 1


@pytest.mark.parametrize("started", [True, False])
def test_cancelling_a_task_frees_its_pages(make_async_llm: MakeAsyncLLM, started: bool) -> None:
    llm = make_async_llm()

    async def main() -> None:
        task = asyncio.create_task(complete(llm, PROMPT, greedy(LONG)))
        if started:
            await until(lambda: llm.stats().generation_tokens >= 2)
        else:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(llm)

    asyncio.run(main())
    assert llm.stats().generation_tokens < LONG


def test_abort_ends_the_stream_with_what_there_is(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def main() -> RequestOutput:
        output = None
        async for output in llm.generate(PROMPT, greedy(LONG), "mine"):
            if len(output.outputs[0].token_ids) >= 3:  # some may come together
                await llm.abort("mine")
                await llm.abort("nobody's")
        await idle(llm)
        assert output is not None
        return output

    output = asyncio.run(main())
    assert output.request_id == "mine" and output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert 3 <= len(output.outputs[0].token_ids) < LONG
    assert llm.stats().aborted == 1


def test_an_abort_of_one_changes_no_other(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def main() -> tuple[RequestOutput, RequestOutput]:
        alone = await complete(llm, PROMPT, greedy(60))
        other = asyncio.create_task(complete(llm, PROMPT, greedy(60)))
        async for output in llm.generate(PROMPT, greedy(LONG), "mine"):
            if len(output.outputs[0].token_ids) >= 10:
                await llm.abort("mine")
        return alone, await other

    alone, other = asyncio.run(main())
    assert alone.outputs == other.outputs


# -- ids ------------------------------------------------------------------------------------


def test_a_running_id_is_refused_and_free_after_its_end(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def main() -> None:
        async for output in llm.generate(PROMPT, greedy(6), "mine"):
            if not output.finished:
                with pytest.raises(InvalidRequestError, match="request_id: 'mine' is already"):
                    await complete(llm, PROMPT, greedy(), "mine")
        assert len(output.outputs[0].token_ids) == 6, "the first goes on"
        assert (await complete(llm, PROMPT, greedy(6), "mine")).outputs == output.outputs
        await idle(llm)

    asyncio.run(main())


def test_an_id_can_be_used_again_at_once(make_async_llm: MakeAsyncLLM) -> None:
    """Nothing of the request that was given up may reach the one that follows."""
    llm = make_async_llm()
    first, second = [70] * 20, [90] * 20

    async def main() -> None:
        expected = await complete(llm, second, greedy(12))
        for tokens in (1, 2, 3, 4, 5):
            async with aclosing(llm.generate(first, greedy(LONG), "mine")) as stream:
                async for output in stream:
                    if len(output.outputs[0].token_ids) >= tokens:
                        break
            assert (await complete(llm, second, greedy(12), "mine")).outputs == expected.outputs
        await idle(llm)

    asyncio.run(main())


# -- overload -------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_recovers(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm(max_num_seqs=1, max_num_waiting=2)

    async def main() -> None:
        running = asyncio.create_task(complete(llm, PROMPT, greedy(LONG), "running"))
        await until(lambda: llm.stats().running == 1)
        waiting = [asyncio.create_task(complete(llm, PROMPT, greedy(4))) for _ in range(2)]
        await until(lambda: llm.stats().waiting == 2)
        with pytest.raises(OverloadedError) as caught:
            await complete(llm, PROMPT, greedy(4))
        assert caught.value.retry_after > 0
        await llm.abort("running")
        assert (await running).outputs[0].finish_reason == "abort"
        for output in await asyncio.gather(*waiting):
            assert output.outputs[0].finish_reason == "length"
        assert (await complete(llm, PROMPT, greedy(4))).finished
        await idle(llm)

    asyncio.run(main())


def test_a_burst_is_taken_as_far_as_the_queue_goes(make_async_llm: MakeAsyncLLM) -> None:
    """All come between two steps, when the queue looks empty to each of them."""
    llm = make_async_llm(max_num_seqs=1, max_num_waiting=3)

    async def main() -> list[RequestOutput | BaseException]:
        tasks = (complete(llm, PROMPT, greedy(4)) for _ in range(12))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await idle(llm)
        return results

    results = asyncio.run(main())
    refused = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(error, OverloadedError) for error in refused)
    assert 3 <= len(results) - len(refused) < 12
    assert all(r.finished for r in results if isinstance(r, RequestOutput))


# -- failures -------------------------------------------------------------------------------


def test_a_failing_request_raises_and_others_go_on(
    make_async_llm: MakeAsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_async_llm(max_num_seqs=1)
    run = llm.engine.runner._forward.loop.run
    calls = 0

    def fail_once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")
        return run(*arguments)

    monkeypatch.setattr(llm.engine.runner._forward.loop, "run", fail_once)

    async def main() -> list[RequestOutput | BaseException]:
        tasks = [complete(llm, PROMPT, greedy()) for _ in range(2)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await idle(llm)
        return results

    failed, served = asyncio.run(main())
    assert isinstance(failed, GenerationError) and str(failed) == "RuntimeError: out of luck"
    assert isinstance(served, RequestOutput) and len(served.outputs[0].token_ids) == 8
    assert llm.stats().failed == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_everybody_is_told(
    make_async_llm: MakeAsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_async_llm()
    step = llm.engine.step
    cause = AssertionError("the engine is wrong")

    def die_later() -> Any:
        if llm.engine.stats().generation_tokens >= 8:
            raise cause
        return step()

    monkeypatch.setattr(llm.engine, "step", die_later)

    async def main() -> list[RequestOutput | BaseException]:
        tasks = [complete(llm, PROMPT, greedy(LONG)) for _ in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineClosedError) as caught:
            await complete(llm, PROMPT, greedy())
        assert caught.value.__cause__ is cause
        return results

    results = asyncio.run(main())
    assert all(isinstance(result, EngineClosedError) for result in results)
    assert all(result.__cause__ is cause for result in results)  # type: ignore[union-attr]
    llm.close()


# -- the end --------------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_ends_the_others(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def main() -> RequestOutput:
        running = asyncio.create_task(complete(llm, PROMPT, greedy(40)))
        await until(lambda: llm.stats().running == 1)
        draining = asyncio.create_task(llm.drain(600.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError):
            await complete(llm, PROMPT, greedy())
        await draining
        assert not llm.engine.has_unfinished_requests
        return await running

    assert len(asyncio.run(main()).outputs[0].token_ids) == 40


def test_draining_gives_up_after_its_time(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def main() -> None:
        async with aclosing(llm.generate(PROMPT, greedy(LONG))) as stream:
            await anext(stream)
            await llm.drain(0.0)
            assert not (await anext(stream)).finished

    asyncio.run(main())


def test_closing_ends_what_runs_and_frees_its_pages(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm(max_num_seqs=2)

    async def main() -> list[RequestOutput | BaseException]:
        tasks = [asyncio.create_task(complete(llm, PROMPT, greedy(LONG))) for _ in range(4)]
        await until(lambda: llm.stats().generation_tokens >= 2)
        llm.close()
        llm.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineClosedError):
            await complete(llm, PROMPT, greedy())
        return results

    results = asyncio.run(main())
    assert all(isinstance(result, EngineClosedError) for result in results)
    assert llm.stats().pages_used == llm.stats().running == llm.stats().waiting == 0
    llm.engine.check_integrity()
    assert not llm._thread.is_alive()


def test_closing_amid_new_requests_leaves_nobody_waiting(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()
    served = threading.Semaphore(0)

    async def ask_again_and_again() -> None:
        with contextlib.suppress(EngineClosedError):
            while True:
                await complete(llm, PROMPT, greedy(1))
                served.release()

    threads = [threading.Thread(target=asyncio.run, args=(ask_again_and_again(),)) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for _ in range(20):
        served.acquire()
    llm.close()
    for thread in threads:
        thread.join()
    assert llm.stats().pages_used == 0


# -- several event loops --------------------------------------------------------------------


def test_event_loops_in_several_threads_share_an_engine(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()
    expected = asyncio.run(complete(llm, PROMPT, greedy(24))).outputs
    results: list[RequestOutput] = []

    async def several() -> None:
        results.extend(await asyncio.gather(*(complete(llm, PROMPT, greedy(24)) for _ in range(3))))

    threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [output.outputs for output in results] == [expected] * 12
    asyncio.run(idle(llm))


def test_only_one_of_several_threads_gets_an_id(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()
    results: list[object] = []
    barrier = threading.Barrier(4)

    async def ask() -> None:
        barrier.wait()
        try:
            results.append(await complete(llm, PROMPT, greedy(64), "mine"))
        except InvalidRequestError as error:
            results.append(error.field)

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)).count("request_id") == 3
    asyncio.run(idle(llm))


def test_a_loop_that_dies_takes_only_its_own_requests_along(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm()

    async def crash() -> None:
        async for _ in llm.generate(PROMPT, greedy(LONG)):
            raise ConnectionError("the client's loop ends in the middle")

    async def main() -> RequestOutput:
        running = asyncio.create_task(complete(llm, PROMPT, greedy(100)))
        await until(lambda: llm.stats().running == 1)
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                await asyncio.to_thread(asyncio.run, crash())
        return await running

    assert len(asyncio.run(main()).outputs[0].token_ids) == 100
    asyncio.run(idle(llm))
    assert llm.stats().aborted == 3
