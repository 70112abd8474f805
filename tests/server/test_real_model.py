"""The embedded model over a real port, used with the real ``openai`` client."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from headrace import AsyncLLM
from tests.server.loopback import serving, wait_until
from tests.server.reading import metrics
from tests.server.test_serving import accepts, running

PROMPT = "def fibonacci(n):\n    "
MESSAGES: list[Any] = [{"role": "user", "content": "Write a function that adds two numbers."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server whose results do not depend on what shares a batch."""
    llm = AsyncLLM(reference=True, kv_cache_memory_bytes=2**26)
    with (
        contextlib.closing(llm),
        serving(llm, model_names=("headrace-embedded",)) as url,
    ):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    options = {"max_tokens": 24, "temperature": 0, **options}
    return client.completions.create(model="headrace-embedded", prompt=prompt, **options)


def test_completion_and_stream_agree(client: openai.OpenAI) -> None:
    whole = complete(client, PROMPT)
    assert whole.choices[0].text
    assert whole.usage.completion_tokens <= 24
    chunks = list(complete(client, PROMPT, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert len(parts) > 5
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_chat_and_stream_agree(client: openai.OpenAI) -> None:
    options: Any = {"model": "headrace-embedded", "messages": MESSAGES, "temperature": 0}
    options |= {"max_completion_tokens": 24}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    answer = whole.choices[0]
    assert answer.message.role == "assistant"
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert all(len(entry.top_logprobs) == 2 for entry in answer.logprobs.content)
    assert all(e.token == e.top_logprobs[0].token for e in answer.logprobs.content)
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.message.content
    assert last.usage == whole.usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )


def test_token_ids_are_the_same_prompt(client: openai.OpenAI, http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert complete(client, ids).choices[0].text == complete(client, PROMPT).choices[0].text
    both = complete(client, [ids, ids[:3]], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text != both.choices[2].text
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == PROMPT


def test_scores_as_evaluation_harnesses_ask_for_them(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    """Token-id prompts, echo, logprobs and one new token; contexts are skipped by their length."""
    context = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    answer = complete(client, context, logprobs=1, max_tokens=8)
    generated = answer.choices[0].logprobs
    longer = http.post("/tokenize", json={"prompt": PROMPT + answer.choices[0].text}).json()
    assert longer["tokens"][: len(context)] == context
    scored = complete(client, [longer["tokens"]], logprobs=1, max_tokens=1, echo=True)
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert scored.choices[0].text.startswith(PROMPT)
    for own, top, expected in zip(
        logprobs.token_logprobs[len(context) : -1],
        logprobs.top_logprobs[len(context) : -1],
        generated.token_logprobs,
        strict=True,
    ):
        assert own == max(top.values())
        assert math.isclose(own, expected, abs_tol=1e-4)
    text = scored.choices[0].text
    for start, end, token in zip(
        logprobs.text_offset, [*logprobs.text_offset[1:], len(text)], logprobs.tokens, strict=True
    ):
        assert text[start:end] == token


def test_scoring_without_generating(client: openai.OpenAI) -> None:
    scored = complete(client, PROMPT, logprobs=0, echo=True, max_tokens=0)
    again = complete(client, PROMPT, logprobs=0, echo=True, max_tokens=1)
    assert scored.choices[0].text == PROMPT
    assert scored.usage.completion_tokens == 0
    logprobs = scored.choices[0].logprobs.token_logprobs
    assert logprobs[1:] == pytest.approx(again.choices[0].logprobs.token_logprobs[1:-1], abs=1e-4)
    chunks = list(complete(client, PROMPT, logprobs=0, echo=True, max_tokens=2, stream=True))
    streamed = [v for chunk in chunks for v in chunk.choices[0].logprobs.token_logprobs]
    assert streamed[1:-2] == pytest.approx(logprobs[1:], abs=1e-4)


def test_extra_sampling_fields(client: openai.OpenAI) -> None:
    options = {"temperature": 1, "seed": 7, "max_tokens": 40}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True}
    first = complete(client, PROMPT, **options, extra_body=extra)
    text = first.choices[0].text
    assert complete(client, PROMPT, **options, extra_body=extra).choices[0].text == text
    assert first.usage.completion_tokens == 40
    stop = text[5:8]
    stopped = complete(client, PROMPT, stop=[stop], **options, extra_body=extra).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    greedy = complete(client, PROMPT, extra_body={"top_k": 1}, temperature=1)
    assert greedy.choices[0].text == complete(client, PROMPT).choices[0].text


def test_concurrent_clients_get_what_they_get_alone(client: openai.OpenAI) -> None:
    prompts = [f"def function_{i}(x):\n    return " for i in range(16)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]

    def stream(prompt: str) -> str:
        chunks = complete(client, prompt, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(stream, prompts)) == alone


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x " * 20_000}, "prompt"),
        ({"prompt": [5_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"extra_body": {"tools": [{}]}}, "tools"),
        ({"extra_body": {"stop_token_ids": [5_000]}}, "stop_token_ids"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{"prompt": PROMPT, **fields})
    assert caught.value.param == param
    assert len(caught.value.message) < 500


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="headrace-embedded"):
        client.completions.create(model="gpt-4", prompt="a")
    assert [model.id for model in client.models.list()] == ["headrace-embedded"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_clients_pages_are_free(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "n": 2, "stream": stream}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    aborted = metrics(http)["headrace_requests_aborted_total"]
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(lambda: metrics(http)["headrace_requests_running"] == 2)
        assert metrics(http)["headrace_pages_used"] > 0
    wait_until(lambda: metrics(http)["headrace_pages_used"] == 0)
    assert metrics(http)["headrace_requests_aborted_total"] == aborted + 1
    assert metrics(http)["headrace_requests_running"] == 0


def test_metrics_count_tokens_and_prefix_hits(client: openai.OpenAI, http: httpx.Client) -> None:
    prompt = "# a comment that is long enough for several pages of the cache\n" * 8
    first = complete(client, prompt)
    before = metrics(http)
    second = complete(client, prompt)
    after = metrics(http)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 32 > 0
    assert second.choices[0].text == first.choices[0].text
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["headrace_prompt_tokens_total"] == second.usage.prompt_tokens
    assert grown["headrace_generation_tokens_total"] == second.usage.completion_tokens
    assert grown["headrace_prefix_hit_tokens_total"] == cached
    assert grown["headrace_time_to_first_token_seconds_count"] == 1


def test_more_requests_than_the_queue_holds() -> None:
    llm = AsyncLLM(max_num_seqs=1, max_num_waiting=1, kv_cache_memory_bytes=2**25)
    long: Any = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    short = {"prompt": PROMPT, "max_tokens": 2}
    with (
        contextlib.closing(llm),
        serving(llm) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        with http.stream("POST", "/v1/completions", json=long) as running_one:
            lines = running_one.iter_lines()
            next(lines)
            waiting_one = pool.submit(http.post, "/v1/completions", json=short)
            wait_until(lambda: metrics(http)["headrace_requests_waiting"] == 1)
            refused = http.post("/v1/completions", json=short)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert waiting_one.result().json()["usage"]["completion_tokens"] == 2


def test_the_command_serves_and_drains() -> None:
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with running("-m", "headrace", "serve", "--port", "0") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not accepts(url))
            *_, usage, _, done, _ = lines
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 400
        assert process.wait(60) == 0
