"""The life of a server: its port, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from headrace.errors import ConfigurationError
from headrace.server import bind, serve
from tests.server.fake_llm import FakeLLM
from tests.server.loopback import wait_until

ROOT = Path(__file__).parents[2]
FAKE = (
    "from tests.server.fake_llm import FakeLLM; from headrace.server import serve;"
    "serve(FakeLLM(), port=0, drain_seconds={seconds})"
)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process that serves on a port of its choice; yields it and its URL."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line):
                    break
            else:
                pytest.fail("".join(lines))
            wait_until(lambda: accepts(found[1]))
            yield process, found[1]
        finally:
            process.kill()


def accepts(url: str) -> bool:
    """Whether a new connection is taken."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_in_use_is_refused_before_any_work() -> None:
    with bind(port=0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        llm = FakeLLM()
        with pytest.raises(ConfigurationError, match=rf":{port}: the port is in use.*--port"):
            serve(llm, port=port)  # type: ignore[arg-type]
        assert llm.closed


def test_a_port_that_is_taken_between_binding_and_serving() -> None:
    first = bind(port=0)
    port = first.getsockname()[1]
    with bind(port=port) as second:
        second.listen()
        with pytest.raises(ConfigurationError, match=f":{port}: the port is in use"):
            serve(FakeLLM(), listener=first)  # type: ignore[arg-type]


def test_addresses_that_cannot_be_had() -> None:
    with pytest.raises(ConfigurationError, match="this machine has no such address"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigurationError, match="cannot resolve"):
        bind("no such host", 0)


def test_only_this_machine_unless_told() -> None:
    with bind(port=0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_bound_port_refuses_connections_until_it_is_served() -> None:
    with bind(port=0) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(number: signal.Signals) -> None:
    body = {"prompt": "x" * 1000, "max_tokens": 1000, "stream": True}
    with running("-c", FAKE.format(seconds=60)) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert "X" in next(lines)
            process.send_signal(number)
            wait_until(lambda: not accepts(url))
            received = list(lines)
        assert received[-2:] == ["data: [DONE]", ""]
        assert sum(line.startswith("data: {") for line in received) >= 900
        assert process.wait(30) == 0


def test_what_runs_longer_than_the_drain_ends_with_an_error() -> None:
    body = {"prompt": "endless", "stream": True}
    with running("-c", FAKE.format(seconds=0)) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last, _ = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(30) == 0


def test_an_idle_server_ends_at_once_though_connections_are_open() -> None:
    with running("-c", FAKE.format(seconds=1000)) as (process, url), httpx.Client() as client:
        assert client.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_second_interrupt_does_not_wait() -> None:
    body = {"prompt": "endless", "stream": True}
    with (
        running("-c", FAKE.format(seconds=1000)) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not accepts(url))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
