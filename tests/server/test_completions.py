"""``/v1/completions``: shapes of responses and streams."""

from __future__ import annotations

from typing import Any

import httpx

from tests.server.fake_llm import END, FakeLLM
from tests.server.reading import events


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def test_one_completion(client: httpx.Client) -> None:
    body = post(client, prompt="hello", model="alias").json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 0
    assert body == {
        "object": "text_completion",
        "model": "alias",
        "choices": [
            {
                "index": 0,
                "text": "HELLO",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_defaults_are_the_models_and_max_tokens_is_16(client: httpx.Client, llm: FakeLLM) -> None:
    post(client, prompt="hello", priority=-3)
    request_id, params, priority = llm.seen[0]
    assert request_id.endswith("-0")
    assert (params.temperature, params.max_tokens, priority) == (0.25, 16, -3)


def test_several_prompts_with_several_completions(client: httpx.Client) -> None:
    body = post(client, prompt=["ab", "cde"], n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["AB", "AB", "CDE", "CDE"]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 10
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


def test_prompts_of_token_ids(client: httpx.Client) -> None:
    one = post(client, prompt=[104, 105], echo=True).json()
    assert one["choices"][0]["text"] == "hiHI"
    two = post(client, prompt=[[104], [105]]).json()
    assert [choice["text"] for choice in two["choices"]] == ["H", "I"]


def test_logprobs(client: httpx.Client) -> None:
    choice = post(client, prompt="hi", logprobs=1).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["H", "I"],
        "token_logprobs": [-3.0, -3.0],
        "top_logprobs": [{"a": -1.0, "H": -3.0}, {"a": -1.0, "I": -3.0}],
        "text_offset": [0, 1],
    }


def test_echo_with_logprobs_and_no_new_tokens(client: httpx.Client) -> None:
    choice = post(client, prompt="hi", logprobs=0, echo=True, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "hi"
    assert choice["logprobs"] == {
        "tokens": ["h", "i"],
        "token_logprobs": [None, -3.0],
        "top_logprobs": [None, {"i": -3.0}],
        "text_offset": [0, 1],
    }


def test_offsets_count_characters_of_the_text(client: httpx.Client) -> None:
    prompt = [*"é".encode(), END, *b"z"]
    choice = post(client, prompt=prompt, logprobs=0, echo=True, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "éz"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1]
    assert choice["logprobs"]["tokens"] == ["\ufffd", "\ufffd", "<end>", "z"]


def test_prompt_logprobs_in_vllms_form(client: httpx.Client) -> None:
    choice = post(client, prompt="hi", prompt_logprobs=0).json()["choices"][0]
    entry = {"logprob": -3.0, "rank": 3, "decoded_token": "i"}
    assert choice["prompt_logprobs"] == [None, {"105": entry}]


def test_a_stream_is_the_whole_in_parts(client: httpx.Client) -> None:
    response = post(client, prompt=["ab", "cde"], stream=True, logprobs=0, echo=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    whole = post(client, prompt=["ab", "cde"], logprobs=0, echo=True).json()
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert len(parts) >= 2
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + ["length"]


def test_a_stream_holds_back_what_is_no_character_yet(client: httpx.Client) -> None:
    chunks = events(post(client, prompt="aß", stream=True))[:-1]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "ASS"
    chunks = events(post(client, prompt="aé", stream=True))[:-1]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts == ["A", "É", ""]


def test_a_stream_reports_usage_when_asked(client: httpx.Client) -> None:
    options = {"include_usage": True}
    *chunks, last, _ = events(post(client, prompt="hi", stream=True, stream_options=options))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 2
    assert last["usage"]["completion_tokens"] == 2
