"""``headrace serve``: a real server, loaded by the real client."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.cli.programs import invoke, start


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
