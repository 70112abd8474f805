"""``headrace serve``: a real server, loaded by the real client."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.cli.programs import invoke, start
from tests.support.adapters import write_adapter


def test_serve_and_bench_serve(tmp_path: Path) -> None:
    options = ("--port", "0", "--api-key", "secret", "--served-model-name", "mine")
    with start("serve", *options, "--drain-seconds", "5", cwd=tmp_path) as server:
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            assert line.startswith("serving headrace-embedded at http://127.0.0.1:"), line
            url = line.split()[-1]
            assert httpx.get(f"{url}/models").status_code == 401
            done = invoke(
                *("bench", "serve", "--base-url", url, "--api-key", "secret", "--json"),
                *("--num-prompts", "6", "--input-len", "20", "--output-len", "5"),
                *("--request-rate", "50", "--max-concurrency", "3"),
            )
            server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=60)
        finally:
            server.kill()
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["model"], result["completed"], result["errors"]) == ("mine", 6, {})
    assert result["output_tokens_per_second"] == pytest.approx(30 / result["seconds"])
    assert (server.returncode, err) == (0, "")


def test_a_port_in_use_is_found_before_loading(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = invoke("serve", str(tmp_path / "no model"), "--port", str(port))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"headrace: port: cannot listen on 127.0.0.1:{port}")


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    done = invoke("serve", str(tmp_path / "none"), "--port", "0")
    assert done.exit_code == 1
    assert str(tmp_path / "none") in done.stderr


@pytest.mark.parametrize("text", ["sql", "=path", "sql="])
def test_an_adapter_needs_a_name_and_a_path(text: str) -> None:
    done = invoke("serve", "--adapter", text, "--port", "0")
    assert done.exit_code == 2
    assert "is no adapter; write NAME=PATH" in " ".join(done.stderr.replace("│", " ").split())


def test_adapters_need_names_of_their_own() -> None:
    done = invoke("serve", "--adapter", "a=one", "--adapter", "a=two", "--port", "0")
    assert done.exit_code == 2
    assert "two adapters are called 'a'" in " ".join(done.stderr.replace("│", " ").split())


def test_an_adapter_that_cannot_be_read(tmp_path: Path) -> None:
    """It is found before the model is loaded, which is not there either."""
    adapter = f"sql={tmp_path / 'nowhere'}"
    done = invoke("serve", str(tmp_path / "none"), "--adapter", adapter, "--port", "0")
    assert done.exit_code == 1
    assert str(tmp_path / "nowhere") in done.stderr


def test_adapters_are_served(tmp_path: Path, embedded_dir: Path) -> None:
    adapter = write_adapter(embedded_dir, tmp_path / "a=b", 1)
    options = ("--port", "0", "--adapter", f"sql={adapter}", "--allow-adapter-updates")
    with start("serve", *options, cwd=tmp_path) as server:
        try:
            assert server.stderr is not None
            url = server.stderr.readline().split()[-1]
            models = httpx.get(f"{url}/models").json()["data"]
            assert [model["id"] for model in models] == ["headrace-embedded", "sql"]
            body = {"model": "sql", "prompt": "import os", "max_tokens": 4, "ignore_eos": True}
            answer = httpx.post(f"{url}/completions", json=body, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 4
            done = httpx.post(f"{url}/unload_lora_adapter", json={"lora_name": "sql"})
            assert done.status_code == 200
        finally:
            server.kill()
