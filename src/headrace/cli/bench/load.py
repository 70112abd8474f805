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
import numpy as np

from headrace.errors import HeadraceError

TIMEOUT = 600.0
"""Seconds of silence to bear."""


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


def connect(base_url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client of the API under ``base_url``, with or without its ``/v1``."""
    root = base_url.rstrip("/").removesuffix("/v1")
    return httpx.AsyncClient(
        base_url=f"{root}/v1/",
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=TIMEOUT,
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
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise HeadraceError(
            f"no answer from {client.base_url}models that names a model "
            f"({type(error).__name__}: {error}); check --base-url, or give --model"
        ) from error


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
        event = json.loads(data)
        if "error" in event:
            record.error = "error in stream"
        for choice in event.get("choices", ()):
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                record.chunks.append(time.perf_counter())
        if usage := event.get("usage"):
            record.input_tokens = usage.get("prompt_tokens", 0)
            record.output_tokens = usage.get("completion_tokens", 0)
    record.error = record.error or "stream cut off"


def summarise(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Throughput, latencies in milliseconds (mean, p50, p99) and errors by kind."""
    good = [record for record in records if record.error is None]
    span = max(r.finished for r in records) - min(r.started for r in records)
    latencies = {
        "time_to_first_token": [r.chunks[0] - r.started for r in good],
        "time_per_output_token": [
            (r.finished - r.chunks[0]) / (r.output_tokens - 1) for r in good if r.output_tokens > 1
        ],
        "inter_token_latency": [late - early for r in good for early, late in pairwise(r.chunks)],
        "end_to_end": [r.finished - r.started for r in good],
    }
    return {
        "requests": len(records),
        "completed": len(good),
        "errors": dict(Counter(r.error for r in records if r.error is not None)),
        "seconds": span,
        "requests_per_second": len(good) / span,
        "input_tokens_per_second": sum(r.input_tokens for r in good) / span,
        "output_tokens_per_second": sum(r.output_tokens for r in good) / span,
        "latency_ms": {
            name: summary([1000 * value for value in values]) for name, values in latencies.items()
        },
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile (linearly interpolated); zeros when there is nothing."""
    mean, middle, high = (np.mean(values), *np.percentile(values, [50, 99])) if values else (0,) * 3
    return {"mean": float(mean), "p50": float(middle), "p99": float(high)}
