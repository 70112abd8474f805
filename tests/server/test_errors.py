"""Every error has OpenAI's format and the right status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from headrace.errors import ConfigurationError
from headrace.server import create_app
from tests.server.fake_llm import FakeLLM
from tests.server.loopback import serving
from tests.server.reading import events

JSON = {"Content-Type": "application/json"}
MEGABYTE = 2**20


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "stop": ["x"] * 10_000}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({"prompt": [[97], []]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": "a", "n": 1000}, "n"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "logit_bias": {"5": 1000}}, "logit_bias"),
        ({}, "prompt"),
    ],
)
def test_a_bad_request_names_its_field(
    client: httpx.Client, llm: FakeLLM, body: dict[str, Any], param: str
) -> None:
    found = error(client.post("/v1/completions", json=body), 400)
    assert found["type"] == "invalid_request_error"
    assert found["param"] == param
    assert param in found["message"]
    assert not llm.seen


def test_chat_speaks_of_its_own_fields(client: httpx.Client) -> None:
    def refused(**fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return error(client.post("/v1/chat/completions", json=body), 400)["param"]

    assert refused(max_completion_tokens=-1) == "max_completion_tokens"
    assert refused(max_tokens=-1) == "max_tokens"
    assert refused(logprobs=True, top_logprobs=-1) == "top_logprobs"
    assert refused(messages=[{"role": "user", "content": "x" * 5000}]) == "messages"
    assert refused(chat_template_kwargs={"tools": []}) == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b'{"\xed\xa0\x80": 1}', "not valid UTF-8"),
        (b"[]", "should be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object(client: httpx.Client, content: bytes, message: str) -> None:
    response = client.post("/v1/completions", content=content, headers=JSON)
    assert message in error(response, 400)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type(client: httpx.Client, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert "application/json" in error(response, 415)["message"]


def test_a_body_of_100_megabytes(client: httpx.Client) -> None:
    content = b"x" * 100 * MEGABYTE
    response = client.post("/v1/completions", content=content, headers=JSON)
    assert error(response, 413)["code"] == "body_too_large"


def test_a_body_of_100_megabytes_without_announced_length(client: httpx.Client) -> None:
    def content() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * MEGABYTE

    response = client.post("/v1/completions", content=content(), headers=JSON)
    assert error(response, 413)["code"] == "body_too_large"
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("announced", "read"), [([(b"content-length", b"9000")], 0), ([], 11)])
def test_a_long_body_is_read_no_further_than_the_limit(
    announced: list[tuple[bytes, bytes]], read: int
) -> None:
    app = create_app(FakeLLM(), model_names=["fake"], max_body_bytes=1000)  # type: ignore[arg-type]
    headers = [(b"content-type", b"application/json"), *announced]
    scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": headers}
    received, sent = [], []

    async def receive() -> dict[str, Any]:
        received.append(100)
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({**scope, "query_string": b"", "http_version": "1.1"}, receive, send))
    assert sent[0]["status"] == 413
    assert len(received) == read


def test_unknown_model_route_and_method(client: httpx.Client) -> None:
    found = error(client.post("/v1/completions", json={"prompt": "a", "model": "gpt"}), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert "fake, alias" in found["message"]
    assert error(client.get("/v1/models/some/model"), 404)["code"] == "model_not_found"
    assert "/v1/nothing" in error(client.get("/v1/nothing"), 404)["message"]
    assert client.get("/v1/models/", follow_redirects=False).status_code == 404
    response = client.get("/v1/completions")
    error(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses(client: httpx.Client, stream: bool) -> None:
    response = client.post("/v1/completions", json={"prompt": "overloaded", "stream": stream})
    assert error(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "3"
    response = client.post("/v1/completions", json={"prompt": "closed", "stream": stream})
    assert error(response, 503)["code"] == "shutting_down"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refusal", ["overloaded", "fail"])
def test_a_prompt_that_fails_ends_its_siblings(
    client: httpx.Client, llm: FakeLLM, refusal: str, stream: bool
) -> None:
    body = {"prompt": ["endless", refusal, "endless"], "max_tokens": None, "stream": stream}
    response = client.post("/v1/completions", json=body)
    if refusal == "fail" and stream:
        assert events(response)[-1]["error"]["code"] == "generation_failed"
    else:
        error(response, 429 if refusal == "overloaded" else 500)
    assert not llm.running
    assert len(llm.aborted) == 2


def test_a_failure_while_running(client: httpx.Client) -> None:
    found = error(client.post("/v1/completions", json={"prompt": "fail"}), 500)
    assert (found["type"], found["code"]) == ("server_error", "generation_failed")
    assert "NaN" in found["message"]


def test_an_unforeseen_failure_shows_no_details(client: httpx.Client) -> None:
    found = error(client.post("/v1/completions", json={"prompt": "crash"}), 500)
    assert "secret" not in found["message"]
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("prompt", ["fail", "crash"])
def test_a_stream_that_fails_ends_with_the_error(client: httpx.Client, prompt: str) -> None:
    response = client.post("/v1/completions", json={"prompt": prompt, "stream": True})
    assert response.status_code == 200
    *chunks, last = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == prompt[:2].upper()
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]


def test_the_api_key() -> None:
    with serving(FakeLLM(), api_key="clé\n") as url, httpx.Client(base_url=url) as client:
        key = "Bearer clé".encode()
        for wrong in (None, b"Bearer cl\xe9", b"Bearer", b"Basic " + key[7:], key + b"x", b"x"):
            headers = {} if wrong is None else {b"Authorization": wrong}
            response = client.get("/v1/models", headers=headers)
            assert error(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert client.get("/nothing", headers=headers).status_code == 401
        for right in (key, b"bearer" + key[6:]):
            assert client.get("/v1/models", headers={b"Authorization": right}).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200


def test_an_empty_api_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="api_key: is empty"):
        create_app(FakeLLM(), api_key=" ", model_names=["fake"])  # type: ignore[arg-type]
