"""Methods chosen by requests, used with the real ``openai`` client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headrace import LLM, AsyncLLM, SamplingParams
from tests.server.loopback import serving

PROMPT = "import os\n" * 40
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
TOKENS = 12
KEEP = {"random-eviction": {"keep": 0.5}}
OPTIONS: dict[str, Any] = {"reference": True, "num_threads": 1, "kv_cache_memory_bytes": 4 << 20}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    llm = AsyncLLM(kv="random-eviction:keep=0.2", **OPTIONS)
    with (
        serving(llm, model_names=("tiny",)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    llm.close()


def complete(client: openai.OpenAI, **body: Any) -> list[float]:
    """Log-probabilities of a completion."""
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True, **body},
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    return [value for value in found.token_logprobs if value is not None]


def expected(choice: Any) -> list[float]:
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    with LLM(kv="random-eviction:keep=0.2", **OPTIONS) as llm:
        [output] = llm.generate(PROMPT, params, methods=choice)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return [next(iter(entry.values())).logprob for entry in logprobs]


def test_requests_choose_their_methods(client: openai.OpenAI) -> None:
    results = [complete(client), complete(client, methods={}), complete(client, methods=KEEP)]
    assert results == [expected(None), expected({}), expected(KEEP)]
    assert results[0] != results[1] != results[2] != results[0]
    for streamed in (False, True):
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=2,
            stream=streamed,
            extra_body={"methods": KEEP},
        )
        assert list(answer) if streamed else answer.choices


@pytest.mark.parametrize(
    ("methods", "field"),
    [
        ({"other": {}}, "methods"),
        ({"random-eviction": {"keep": 7}}, "methods.random-eviction"),
        ({"random-eviction": {"keep": "half"}}, "methods.random-eviction.keep"),
        ({"random-eviction": 3}, "methods.random-eviction"),
        ("random-eviction", "methods"),
    ],
)
def test_wrong_choices(client: openai.OpenAI, methods: Any, field: str) -> None:
    for request in (
        lambda: complete(client, methods=methods),
        lambda: client.embeddings.create(
            model="tiny", input="text", extra_body={"methods": methods}
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            request()
        assert caught.value.param == field
