"""``headrace bench serve``: a server under load."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import typer

from headrace.cli.bench.engine import random_prompts
from headrace.cli.options import Json, option_set, takes
from headrace.cli.output import progress, report, rows_of
from headrace.errors import ConfigurationError

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world")
PATHS = {"completions": "completions", "chat": "chat/completions"}
VOCAB_SIZE = 4000
"""Every server's vocabulary has as many tokens."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent to a server.

    Args:
        base_url: any OpenAI-compatible server.
        model: the first one that the server lists if ``None``.
        api: which endpoint takes the load: completions of token ids, or chat of as many words.
        api_key: key to send.
        num_prompts: requests.
        request_rate: mean arrivals per second (a Poisson process); all at once if ``None``.
        max_concurrency: requests in flight at most.
        input_len: tokens of each prompt.
        output_len: tokens to generate for each prompt.
        shared_prefix_len: tokens that all prompts share.
        ignore_eos: ask for full-length outputs, an extension that not every server takes.
        seed: of prompts and arrivals.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api: str = "completions"
    api_key: str | None = None
    num_prompts: int = 64
    request_rate: float | None = None
    max_concurrency: int | None = None
    input_len: int = 128
    output_len: int = 64
    shared_prefix_len: int = 0
    ignore_eos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.api not in PATHS:
            raise ConfigurationError(f"api: must be one of {', '.join(PATHS)}, got {self.api!r}")
        for name in ("num_prompts", "max_concurrency", "input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}: must be at least 1, got {value}")
        if self.request_rate is not None and self.request_rate <= 0:
            raise ConfigurationError(f"request_rate: must be above 0, got {self.request_rate}")

    def bodies(self, model: str) -> list[dict[str, Any]]:
        """The bodies of all requests."""
        common = {
            "model": model,
            "max_tokens": self.output_len,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        prompts = random_prompts(
            self.num_prompts,
            self.input_len,
            VOCAB_SIZE,
            shared=self.shared_prefix_len,
            seed=self.seed,
        )
        if self.api == "completions":
            return [{"prompt": prompt, **common} for prompt in prompts]
        texts = (" ".join(WORDS[token % len(WORDS)] for token in prompt) for prompt in prompts)
        return [{"messages": [{"role": "user", "content": text}], **common} for text in texts]


@takes(load=option_set(Load, "Load", flags={"model": "--model -m"}))
def serve(load: dict[str, Any], as_json: Json = False) -> None:
    """Send requests to a server; print latencies and throughput as a client sees them."""
    with progress("measuring"):
        result = asyncio.run(_measure(Load(**load)))
    errors = {f"failed: {kind}": count for kind, count in result["errors"].items()}
    latencies = [
        (name.replace("_", " "), *figures.values())
        for name, figures in result["latency_ms"].items()
    ]
    report(
        result,
        (
            f"{result['model']}: {result['requests']} requests",
            ("", "value"),
            rows_of(result | errors),
        ),
        ("latency, ms", ("", "mean", "p50", "p99"), latencies),
        as_json=as_json,
    )
    if not result["completed"]:
        raise typer.Exit(1)


async def _measure(load: Load) -> dict[str, Any]:
    from headrace.cli.bench.load import connect, first_model, run_load, summarise

    async with connect(load.base_url, load.api_key) as client:
        model = load.model or await first_model(client)
        records = await run_load(
            client,
            PATHS[load.api],
            load.bodies(model),
            request_rate=load.request_rate,
            max_concurrency=load.max_concurrency,
            seed=load.seed,
        )
    return {"model": model, "base_url": load.base_url, **summarise(records)}
