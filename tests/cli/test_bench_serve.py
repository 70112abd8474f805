"""The load client, against a server whose behaviour is known."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from itertools import pairwise
from typing import Any

import pytest
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.cli.bench import load
from headrace.cli.bench.engine import random_prompts
from tests.cli.fake_server import fake_server


def bench_serve(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def test_counts_and_latencies() -> None:
    with fake_server() as (url, handler):
        done = bench_serve(
            *("--base-url", url, "--num-prompts", "6", "--input-len", "5", "--output-len", "3"),
            *("--shared-prefix-len", "2", "--api-key", "secret", "--json"),
        )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["model"], result["requests"], result["completed"]) == ("fake", 6, 6)
    assert result["errors"] == {}
    assert result["output_tokens_per_second"] == pytest.approx(18 / result["seconds"])
    assert result["input_tokens_per_second"] == pytest.approx(30 / result["seconds"])
    for figures in result["latency_ms"].values():
        assert 0 < figures["p50"] <= figures["p99"]
    first = result["latency_ms"]["time_to_first_token"]["mean"]
    assert first < result["latency_ms"]["end_to_end"]["mean"]
    bodies = handler.bodies
    assert {body["path"] for body in bodies} == {"/v1/completions"}
    assert all(len(body["prompt"]) == 5 and body["stream"] is True for body in bodies)
    assert len({tuple(body["prompt"][:2]) for body in bodies}) == 1
    assert len({tuple(body["prompt"]) for body in bodies}) == 6
    assert set(handler.keys) == {"Bearer secret"}


def test_tables_and_chat() -> None:
    with fake_server() as (url, handler):
        done = bench_serve(
            *("--base-url", f"{url}/v1/", "--api", "chat", "--model", "other", "--no-ignore-eos"),
            *("--num-prompts", "2", "--input-len", "4", "--output-len", "2"),
        )
    assert done.exit_code == 0, done.output
    assert "other: 2 requests" in done.stdout
    assert "time to first token" in done.stdout
    (first, _) = handler.bodies
    assert first["path"] == "/v1/chat/completions"
    assert first["model"] == "other"
    assert len(first["messages"][0]["content"].split()) == 4
    assert "ignore_eos" not in first


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = bench_serve("--base-url", url)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"headrace: no answer from {url}")


def records(prompts: list[list[int]], **arrivals: Any) -> list[load.RequestRecord]:
    """Send prompts to a fake server."""
    bodies = [{"prompt": prompt, "max_tokens": 2} for prompt in prompts]
    options = {"request_rate": None, "max_concurrency": None, "seed": 0, **arrivals}

    async def go(url: str) -> list[load.RequestRecord]:
        async with load.connect(url, None) as client:
            return await load.run_load(client, "completions", bodies, **options)

    with fake_server() as (url, _):
        return asyncio.run(go(url))


def test_failures_are_counted_by_kind() -> None:
    result = load.summarise(records([[0], [0], [1], [2], [5, 6]]))
    assert result["completed"] == 1
    assert result["errors"] == {"HTTP 429": 2, "stream cut off": 1, "JSONDecodeError": 1}
    assert result["output_tokens_per_second"] == pytest.approx(2 / result["seconds"])


def test_nothing_completed() -> None:
    result = load.summarise(records([[0]]))
    assert result["completed"] == 0
    assert result["latency_ms"]["end_to_end"] == {"mean": 0, "p50": 0, "p99": 0}


@pytest.mark.parametrize("seed", [1, 2])
def test_arrivals_are_a_poisson_process(seed: int) -> None:
    rng = random.Random(seed)
    gaps = [rng.expovariate(200.0) for _ in range(3)]
    begin = time.perf_counter()
    done = records([[5]] * 4, request_rate=200.0, seed=seed)
    for index, record in enumerate(done):
        assert record.started - begin >= sum(gaps[:index])


def test_concurrency_is_bounded() -> None:
    done = records([[5]] * 8, max_concurrency=1)
    ordered = sorted(done, key=lambda record: record.started)
    for earlier, later in pairwise(ordered):
        assert earlier.finished <= later.started


def test_random_prompts() -> None:
    prompts = random_prompts(3, 6, 1000, shared=4, seed=1)
    assert prompts == random_prompts(3, 6, 1000, shared=4, seed=1)
    assert prompts != random_prompts(3, 6, 1000, shared=4, seed=2)
    assert {tuple(prompt[:4]) for prompt in prompts} == {tuple(prompts[0][:4])}
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(0 <= token < 5 for prompt in random_prompts(9, 9, 5) for token in prompt)
