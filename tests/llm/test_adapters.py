"""Adapters of the two faces: what is held, and what loading does to a running engine."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.errors import CheckpointError, EngineClosedError, InvalidRequestError
from tests.llm.conftest import MakeAsyncLLM, MakeLLM, check_idle
from tests.support.adapters import write_adapter

PROMPT = list(range(64, 84))
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapter(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the embedded model."""
    return write_adapter(embedded_dir, tmp_path_factory.mktemp("adapters") / "a", 1)


def kept(llm: LLM | AsyncLLM) -> set[str]:
    """Keys of the adapters that are in memory."""
    targets = llm.adapters._bank._targets
    return {key for target in targets for key in target.linear.adapters}


async def complete(llm: AsyncLLM, params: SamplingParams = SHORT, **options: Any) -> list[int]:
    """The tokens of a completion."""
    outputs = [output async for output in llm.generate(PROMPT, params, **options)]
    return outputs[-1].outputs[0].token_ids


def hold(llm: AsyncLLM) -> threading.Event:
    """Stop the engine's thread between two steps, until the event is set."""
    go_on = threading.Event()
    llm._inbox.put(go_on.wait)
    return go_on


def test_an_unknown_name_among_several_holds_nothing(make_llm: MakeLLM, adapter: Path) -> None:
    llm = make_llm(adapters={"a": adapter})
    for call in (llm.generate, llm.embed):
        with pytest.raises(InvalidRequestError, match="'b' is not loaded; loaded: a"):
            call([PROMPT, PROMPT], adapter=["a", "b"])
    llm.unload_adapter("a")
    assert kept(llm) == set()


@pytest.mark.parametrize("names", [[], ["a"], [None, "a", None]])
def test_one_adapter_for_each_prompt(
    make_llm: MakeLLM, adapter: Path, names: list[str | None]
) -> None:
    llm = make_llm(adapters={"a": adapter})
    with pytest.raises(InvalidRequestError, match=f"{len(names)} were given for 2 prompts"):
        llm.generate([PROMPT, PROMPT], SHORT, adapter=names)


def test_chats_and_embeddings_take_adapters(make_llm: MakeLLM, adapter: Path) -> None:
    llm = make_llm(adapters={"a": adapter})
    plain, adapted = llm.embed([PROMPT, PROMPT], adapter=[None, "a"])
    assert plain.embedding is not None and adapted.embedding is not None
    assert np.abs(plain.embedding - adapted.embedding).max() > 0.01
    messages = [{"role": "user", "content": "What does shutil.copytree do?"}]
    plain, adapted = (llm.chat(messages, SHORT, adapter=name)[0] for name in (None, "a"))
    assert plain.outputs[0].token_ids != adapted.outputs[0].token_ids


def test_an_adapter_that_cannot_be_read_is_refused_before_the_model_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        LLM(str(tmp_path / "no model"), adapters={"a": tmp_path})


def test_a_load_that_nobody_waits_for_is_left_out(
    make_async_llm: MakeAsyncLLM, adapter: Path
) -> None:
    llm = make_async_llm()

    async def main() -> None:
        go_on = hold(llm)
        loading = asyncio.create_task(llm.load_adapter("a", adapter))
        while not llm._calls:
            await asyncio.sleep(0.005)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        go_on.set()
        assert len(await complete(llm)) == 4, "the engine goes on"
        with pytest.raises(InvalidRequestError, match="'a' is not loaded"):
            await complete(llm, adapter="a")

    asyncio.run(main())
    assert llm.is_running and kept(llm) == set() and not llm._calls


def test_a_load_that_fails_leaves_the_engine_running(
    make_async_llm: MakeAsyncLLM, tmp_path: Path
) -> None:
    llm = make_async_llm()

    async def main() -> None:
        with pytest.raises(CheckpointError):
            await llm.load_adapter("a", tmp_path)
        with pytest.raises(InvalidRequestError, match="'a' is not loaded; loaded: none"):
            await llm.unload_adapter("a")
        assert len(await complete(llm)) == 4

    asyncio.run(main())
    assert not llm._calls


def test_a_full_queue_keeps_no_adapter_out(make_async_llm: MakeAsyncLLM, adapter: Path) -> None:
    llm = make_async_llm(max_num_seqs=1, max_num_waiting=1)

    async def main() -> None:
        tasks = [asyncio.create_task(complete(llm, LONG))]
        while not llm.stats().running:
            await asyncio.sleep(0.005)
        tasks.append(asyncio.create_task(complete(llm, LONG)))
        while not llm.engine.queue_is_full:
            await asyncio.sleep(0.005)
        await llm.load_adapter("a", adapter)
        assert llm.adapters.directories == {"a": adapter}
        await llm.unload_adapter("a")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert llm.adapters.directories == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_loads_are_told(make_async_llm: MakeAsyncLLM, adapter: Path) -> None:
    llm = make_async_llm()
    cause = AssertionError("the engine is wrong")

    def die() -> None:
        raise cause

    async def main() -> None:
        go_on = hold(llm)
        llm._inbox.put(die)
        loading = asyncio.create_task(llm.load_adapter("a", adapter))
        while not llm._calls:
            await asyncio.sleep(0.005)
        go_on.set()
        for load in (loading, llm.load_adapter("a", adapter)):
            with pytest.raises(EngineClosedError) as caught:
                await load
            assert caught.value.__cause__ is cause

    asyncio.run(main())


def test_given_up_requests_release_their_adapter(
    make_async_llm: MakeAsyncLLM, adapter: Path
) -> None:
    llm = make_async_llm(adapters={"a": adapter})

    async def main() -> None:
        task = asyncio.create_task(complete(llm, LONG, adapter="a"))
        while not llm.stats().generation_tokens:
            await asyncio.sleep(0.005)
        await llm.unload_adapter("a")
        assert kept(llm) == {"a#1"}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while kept(llm):
            await asyncio.sleep(0.005)

    asyncio.run(main())
    check_idle(llm.engine)


def test_an_aborted_text_has_no_embedding(make_async_llm: MakeAsyncLLM) -> None:
    llm = make_async_llm(max_num_batched_tokens=4)

    async def main() -> None:
        go_on = hold(llm)
        embedding = asyncio.create_task(llm.embed(PROMPT, "mine"))
        while not llm._streams:
            await asyncio.sleep(0.005)
        await llm.abort("mine")
        go_on.set()
        output = await embedding
        assert output.outputs[0].finish_reason == "abort" and output.embedding is None

    asyncio.run(main())
    check_idle(llm.engine)
