"""A server over the fake engine, and clients for it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.server.fake_llm import FakeLLM
from tests.server.loopback import serving


@pytest.fixture(scope="module")
def fake_server() -> Iterator[tuple[FakeLLM, str]]:
    """One server for a module's tests, and its engine."""
    llm = FakeLLM()
    with serving(llm) as url:
        yield llm, url


@pytest.fixture
def llm(fake_server: tuple[FakeLLM, str]) -> FakeLLM:
    """The engine behind ``client``; it remembers only the present test."""
    llm, _ = fake_server
    assert not llm.running
    llm.seen.clear()
    llm.aborted.clear()
    return llm


@pytest.fixture
def client(fake_server: tuple[FakeLLM, str], llm: FakeLLM) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server[1], timeout=30) as client:
        yield client
