"""Completions that see each other, chosen by a request over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headrace import LLM, AsyncLLM, SamplingParams
from tests.server.loopback import serving

NAME = "hogwild-inference"
PROMPT = "import os\nimport"
OPTIONS: dict[str, Any] = {"methods": (NAME,), "reference": True, "num_threads": 1}
OPTIONS["kv_cache_memory_bytes"] = 8 << 20
CHOICE: dict[str, Any] = {NAME: {"header": "\n# {number}\n"}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    llm = AsyncLLM(**OPTIONS)
    with (
        serving(llm, model_names=("tiny",)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    llm.close()


def complete(client: openai.OpenAI, methods: Any, n: int = 3) -> list[str]:
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=6,
        n=n,
        temperature=0,
        extra_body={"ignore_eos": True, "methods": methods},
    )
    return [choice.text for choice in sorted(answer.choices, key=lambda each: each.index)]


def test_a_request_makes_a_gang(client: openai.OpenAI) -> None:
    found = [complete(client, methods) for methods in (CHOICE, {})]
    params = SamplingParams(n=3, max_tokens=6, temperature=0.0, ignore_eos=True)
    with LLM(**OPTIONS) as llm:
        outputs = llm.generate([PROMPT] * 2, params, methods=[CHOICE, {}])
    assert found == [[each.text for each in output.outputs] for output in outputs]
    assert found[0] != found[1] and len(set(found[1])) == 1


def test_a_gang_without_room_is_refused(client: openai.OpenAI) -> None:
    for n, methods, message in (
        (120, CHOICE, "sequences that see each other"),
        (2, {NAME: {"header": 1}}, "header: must be of type str"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            complete(client, methods, n)
