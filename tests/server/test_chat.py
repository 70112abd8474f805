"""``/v1/chat/completions``: shapes of responses and streams."""

from __future__ import annotations

from typing import Any

import httpx

from tests.server.fake_llm import FakeLLM
from tests.server.reading import events

USER = {"role": "user", "content": "hi"}


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    response = client.post("/v1/chat/completions", json={"messages": [USER], **body})
    assert response.status_code == 200, response.text
    return response


def test_one_answer(client: httpx.Client) -> None:
    body = post(client).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 0
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "USER: HI\nASSISTANT:",
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 19,
            "completion_tokens": 19,
            "total_tokens": 38,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_the_whole_context_is_the_default(client: httpx.Client, llm: FakeLLM) -> None:
    post(client)
    assert llm.seen[0][1].max_tokens is None


def test_without_a_generation_prompt(client: httpx.Client) -> None:
    answer = post(client, add_generation_prompt=False).json()["choices"][0]["message"]
    assert answer["content"] == "USER: HI\n"


def test_an_answer_can_be_sent_back(client: httpx.Client) -> None:
    answer = post(client, max_completion_tokens=4).json()["choices"][0]["message"]
    again = post(client, messages=[USER, answer, USER]).json()["choices"][0]["message"]
    assert "ASSISTANT: USER\n" in again["content"]


def test_logprobs(client: httpx.Client) -> None:
    choice = post(client, logprobs=True, top_logprobs=2, max_tokens=1).json()["choices"][0]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "U",
                "logprob": -3.0,
                "bytes": [85],
                "top_logprobs": [
                    {"token": "a", "logprob": -1.0, "bytes": [97]},
                    {"token": "b", "logprob": -2.0, "bytes": [98]},
                ],
            }
        ],
        "refusal": None,
    }
    choice = post(client, logprobs=True, max_tokens=1).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_prompt_logprobs_in_vllms_form(client: httpx.Client) -> None:
    found = post(client, prompt_logprobs=0, max_tokens=1).json()["prompt_logprobs"]
    assert found[0] is None
    assert found[1] == {"115": {"logprob": -3.0, "rank": 3, "decoded_token": "s"}}


def test_a_stream_is_the_whole_in_parts(client: httpx.Client) -> None:
    options = {"include_usage": True}
    response = post(client, n=2, logprobs=True, stream=True, stream_options=options)
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == 38
    whole = post(client, n=2, logprobs=True).json()
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        roles = [part["delta"].get("role") for part in parts]
        assert roles == ["assistant"] + [None] * (len(parts) - 1)
        content = "".join(part["delta"].get("content", "") for part in parts)
        assert content == choice["message"]["content"]
        logprobs = [entry for part in parts for entry in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]


def test_an_empty_answer_streams_too(client: httpx.Client) -> None:
    (chunk, done) = events(post(client, max_tokens=0, stream=True))
    assert done == "[DONE]"
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "length"
