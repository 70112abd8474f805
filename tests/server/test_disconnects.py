"""A client that goes away gives its pages back at once, whatever it was waiting for."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.fake_llm import FakeLLM
from tests.server.loopback import wait_until


def send(client: httpx.Client, body: dict[str, Any]) -> socket.socket:
    """Post a completion request by hand; the answer is not waited for."""
    url = urlsplit(str(client.base_url))
    assert url.hostname is not None and url.port is not None
    connection = socket.create_connection((url.hostname, url.port))
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["endless", ["endless", "endless", "done"]])
def test_a_disconnected_client(
    client: httpx.Client, llm: FakeLLM, prompt: str | list[str], stream: bool
) -> None:
    with send(client, {"prompt": prompt, "stream": stream, "n": 2}) as connection:
        count = 1 if isinstance(prompt, str) else 2
        wait_until(lambda: len(llm.seen) >= count and len(llm.running) == count)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert not llm.aborted
    wait_until(lambda: not llm.running)
    assert len(llm.aborted) == count


def test_a_client_that_leaves_in_the_middle_of_its_body(
    client: httpx.Client, llm: FakeLLM, caplog: pytest.LogCaptureFixture
) -> None:
    url = urlsplit(str(client.base_url))
    head = "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n{")
        assert client.get("/health").status_code == 200
    assert client.get("/health").status_code == 200
    assert not llm.seen
    assert not caplog.records
