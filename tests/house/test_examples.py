"""The examples of the README and the docs do what they say: all of them are run."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.house.pages import PAGES, blocks, shell_lines
from tests.house.source import ROOT, relative

SCRIPTS = Path(sysconfig.get_path("scripts"))
ADDRESS = "localhost:8000"
START_SECONDS = 60
PYTHON = [
    pytest.param(source, id=f"{relative(page)}-{number}")
    for page in PAGES
    for number, source in enumerate(blocks(page, "python"))
]
REQUESTS = [
    pytest.param(line, id=f"{relative(page)}-{number}")
    for page in PAGES
    for number, line in enumerate(shell_lines(page))
    if line.startswith("curl ")
]
RUNS = sorted(
    {
        line
        for page in PAGES
        for line in shell_lines(page)
        if "headrace run " in line and "pip install" not in line
    }
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a running server of the embedded model."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([SCRIPTS / "headrace", "serve", "--port", str(port)])
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"http://localhost:{port}/health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    """Whether a GET is answered with success."""
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def run(command: list[str], cwd: Path) -> str:
    """What a command prints; it must succeed. The program is found as in an active environment."""
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def send(line: str) -> httpx.Response:
    """Do what a curl command does, of the options that the docs use."""
    words = shlex.split(line)[1:]
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    bodies = [words[i + 1] for i, word in enumerate(words) if word == "-d"]
    (url,) = (word for word in words if word.startswith("http"))
    if bodies:
        return httpx.post(url, content=bodies[0], headers=headers, timeout=60)
    return httpx.get(url, headers=headers, timeout=60)


@pytest.mark.parametrize("source", PYTHON)
def test_python_examples(source: str, server: str, tmp_path: Path) -> None:
    run([sys.executable, "-c", source.replace(ADDRESS, server)], tmp_path)


@pytest.mark.parametrize("line", REQUESTS)
def test_requests(line: str, server: str) -> None:
    response = send(line.replace(ADDRESS, server))
    assert response.is_success, response.text
    assert response.text.strip()


def test_the_server_has_what_its_page_lists(server: str) -> None:
    page = (ROOT / "docs" / "server.md").read_text("utf-8")
    endpoints = re.findall(r"^\| (GET|POST) \| `(\S+)` \|", page, re.MULTILINE)
    assert len(endpoints) > 5
    for method, path in endpoints:
        assert httpx.request(method, f"http://{server}{path}").status_code not in (404, 405), path
    metrics = httpx.get(f"http://{server}/metrics").text
    served = set(re.findall(r"^# HELP (headrace_\w+) ", metrics, re.MULTILINE))
    created = {name for name in served if name.endswith("_created")}  # when each counter began
    assert set(re.findall(r"`(headrace_\w+)`", page)) == served - created


@pytest.mark.parametrize("line", RUNS)
def test_run_commands(line: str, tmp_path: Path) -> None:
    assert run(["bash", "-c", line], tmp_path).strip()
