"""An asyncio client that puts load on an OpenAI-compatible server and notes the times."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from headrace.cli.timing import summary
from headrace.errors import HeadraceError


@dataclass(slots=True)
class RequestRecord:
    """What became of one request. Moments in seconds on one clock.

    Args:
        started: when it was sent.
        chunks: when each piece of output arrived.
        finished: when the stream ended.
        input_tokens, output_tokens: as the server counted, else 0 and the number of pieces.
        error: why it failed; ``None`` for success.
    """

    started: float = 0.0
    chunks: list[float] = field(default_factory=list)
    finished: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def end_to_end(self) -> float:
        """Seconds from sending to the end."""
        return self.finished - self.started

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending to the first piece of output."""
        return self.chunks[0] - self.started

    @property
    def time_per_output_token(self) -> float:
        """Mean seconds per token after the first."""
        return (self.finished - self.chunks[0]) / (self.output_tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in pairwise(self.chunks)]


def connect(base_url: str, api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """A client of the API under ``base_url``, with or without its ``/v1``."""
    root = base_url.rstrip("/").removesuffix("/v1")
    return httpx.AsyncClient(
        base_url=f"{root}/v1/",
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=timeout,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def first_model(client: httpx.AsyncClient) -> str:
    """The name of the first model the server lists.

    Raises:
        HeadraceError: the server cannot be reached or lists none.
    """
    try:
        response = await client.get("models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise HeadraceError(f"no answer from {client.base_url}models: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        message = f"{client.base_url}models does not list a model; name one with --model"
        raise HeadraceError(message) from error


async def run_load(
    client: httpx.AsyncClient,
    path: str,
    bodies: Sequence[dict[str, Any]],
    *,
    request_rate: float | None,
    max_concurrency: int | None,
    seed: int,
) -> list[RequestRecord]:
    """Send every body to ``path``; arrivals are a Poisson process.

    Args:
        request_rate: mean arrivals per second; ``None`` sends all at once.
        max_concurrency: requests in flight at most; the others wait, their clock not yet running.
    """
    rng = random.Random(seed)
    slots = asyncio.Semaphore(max_concurrency or len(bodies))
    arrival = 0.0

    async def one(body: dict[str, Any], delay: float) -> RequestRecord:
        await asyncio.sleep(delay)
        async with slots:
            return await send(client, path, body)

    tasks = []
    for body in bodies:
        tasks.append(asyncio.create_task(one(body, arrival)))
        arrival += rng.expovariate(request_rate) if request_rate else 0.0
    return await asyncio.gather(*tasks)


async def send(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> RequestRecord:
    """Run one streaming request; an error ends up in the record."""
    record = RequestRecord(started=time.perf_counter())
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.is_error:
                await response.aread()
                record.error = f"HTTP {response.status_code}"
            else:
                await _read_events(response, record)
    except (httpx.HTTPError, ValueError) as error:
        record.error = type(error).__name__
    record.finished = time.perf_counter()
    if record.error is None and not record.chunks:
        record.error = "no output"
    record.output_tokens = record.output_tokens or len(record.chunks)
    return record


async def _read_events(response: httpx.Response, record: RequestRecord) -> None:
    """Note each server-sent event until ``[DONE]``."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        _note_event(json.loads(data), record)
    record.error = record.error or "stream cut off"


def _note_event(event: dict[str, Any], record: RequestRecord) -> None:
    if "error" in event:
        record.error = "error in stream"
        return
    for choice in event.get("choices", ()):
        if choice.get("text") or (choice.get("delta") or {}).get("content"):
            record.chunks.append(time.perf_counter())
    if usage := event.get("usage"):
        record.input_tokens = usage.get("prompt_tokens", 0)
        record.output_tokens = usage.get("completion_tokens", 0)


def summarise(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Throughput, latencies in milliseconds (mean, p50, p99) and errors by kind."""
    good = [record for record in records if record.error is None]
    span = max(r.finished for r in records) - min(r.started for r in records)
    outputs, inputs = sum(r.output_tokens for r in good), sum(r.input_tokens for r in good)
    latencies = {
        "time_to_first_token": [r.time_to_first_token for r in good],
        "time_per_output_token": [r.time_per_output_token for r in good if r.output_tokens > 1],
        "inter_token_latency": [gap for r in good for gap in r.inter_token_latencies],
        "end_to_end": [r.end_to_end for r in good],
    }
    return {
        "completed": len(good),
        "errors": dict(Counter(r.error for r in records if r.error is not None)),
        "seconds": span,
        "requests_per_second": len(good) / span,
        "input_tokens_per_second": inputs / span,
        "output_tokens_per_second": outputs / span,
        "latency_ms": {
            name: {key: 1000 * value for key, value in summary(values).items()}
            for name, values in latencies.items()
        },
    }
