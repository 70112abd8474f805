"""Engines on the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headrace import LLM, AsyncLLM
from headrace.engine.engine import Engine

SMALL: dict[str, Any] = {
    # One thread is the fastest for a model this small, the more so when tests run side by side.
    "num_threads": 1,
    "kv_cache_memory_bytes": 4 << 20,
    "reference": True,
    "seed": 0,
}
"""Options of an engine that is cheap to make, and whose results do not depend on the batch."""

MakeLLM = Callable[..., LLM]
MakeAsyncLLM = Callable[..., AsyncLLM]


def check_idle(engine: Engine) -> None:
    """Nothing runs, waits or holds a page."""
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
    assert not engine.has_unfinished_requests


@pytest.fixture(scope="module")
def shared_llm() -> Iterator[LLM]:
    """One engine for all tests that leave it as it was."""
    with LLM(**SMALL) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """An engine that must be idle after the test."""
    yield shared_llm
    check_idle(shared_llm.engine)


@pytest.fixture
def make_llm() -> Iterator[MakeLLM]:
    """Makes engines with other options."""
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        made.append(LLM(**{**SMALL, **options}))
        return made[-1]

    yield make
    for llm in made:
        check_idle(llm.engine)
        llm.close()


@pytest.fixture
def make_async_llm() -> Iterator[MakeAsyncLLM]:
    """Makes engines with threads of their own, and closes them."""
    made: list[AsyncLLM] = []

    def make(**options: Any) -> AsyncLLM:
        made.append(AsyncLLM(**{**SMALL, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()
