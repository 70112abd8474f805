"""``headrace bench serve``: a server under load."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import typer

from headrace.cli.bench.workload import random_prompts
from headrace.cli.options import Json, option_set, takes
from headrace.cli.output import print_json, print_table, working
from headrace.errors import ConfigurationError

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world")
PATHS = {"completions": "completions", "chat": "chat/completions"}


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent to a server.

    Args:
        base_url: any OpenAI-compatible server.
        model: the first one that the server lists if ``None``.
        api: which endpoint takes the load, completions or chat.
        api_key: key to send.
        num_prompts: requests.
        request_rate: mean arrivals per second (a Poisson process); all at once if ``None``.
        max_concurrency: requests in flight at most.
        input_len: tokens of each prompt.
        output_len: tokens to generate for each prompt.
        shared_prefix_len: tokens that all prompts share.
        vocab_size: token ids are drawn below it.
        text: send words in place of token ids, which makes lengths approximate; chats always do.
        ignore_eos: ask for full-length outputs, an extension that not every server takes.
        temperature: of every request.
        timeout: seconds of silence to bear.
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
    vocab_size: int = 4000
    text: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.api not in PATHS:
            raise ConfigurationError(f"api: must be one of {', '.join(PATHS)}, got {self.api!r}")
        for name in ("num_prompts", "max_concurrency", "input_len", "output_len", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}: must be at least 1, got {value}")
        if self.request_rate is not None and self.request_rate <= 0:
            raise ConfigurationError(f"request_rate: must be above 0, got {self.request_rate}")

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of all requests, but for the model's name."""
        ids = random_prompts(
            self.num_prompts,
            self.input_len,
            self.vocab_size,
            shared=self.shared_prefix_len,
            seed=self.seed,
        )
        common = {
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        return [{**self._prompt(token_ids), **common} for token_ids in ids]

    def _prompt(self, token_ids: list[int]) -> dict[str, Any]:
        words = " ".join(WORDS[token % len(WORDS)] for token in token_ids)
        if self.api == "chat":
            return {"messages": [{"role": "user", "content": words}]}
        return {"prompt": words if self.text else token_ids}


@takes(load=option_set(Load, "Load", names={"model": ("--model", "-m")}))
def serve(load: dict[str, Any], as_json: Json = False) -> None:
    """Send requests to a server; print latencies and throughput as a client sees them."""
    with working("measuring"):
        result = asyncio.run(_measure(Load(**load)))
    if as_json:
        print_json(result)
    else:
        _print_tables(result)
    if not result["completed"]:
        raise typer.Exit(1)


async def _measure(load: Load) -> dict[str, Any]:
    from headrace.cli.bench.load import connect, first_model, run_load, summarise

    async with connect(load.base_url, load.api_key, load.timeout) as client:
        name = load.model or await first_model(client)
        records = await run_load(
            client,
            PATHS[load.api],
            [{"model": name, **body} for body in load.bodies()],
            request_rate=load.request_rate,
            max_concurrency=load.max_concurrency,
            seed=load.seed,
        )
    return {"model": name, "base_url": load.base_url, "requests": len(records)} | summarise(records)


def _print_tables(result: dict[str, Any]) -> None:
    names = [name for name, value in result.items() if isinstance(value, (int, float))]
    rows = [(name.replace("_", " "), result[name]) for name in names]
    rows += [(f"failed: {kind}", count) for kind, count in result["errors"].items()]
    print_table(f"{result['model']}: {result['requests']} requests", ("", "value"), rows)
    latencies = [
        (name.replace("_", " "), values["mean"], values["p50"], values["p99"])
        for name, values in result["latency_ms"].items()
    ]
    print_table("latency, ms", ("", "mean", "p50", "p99"), latencies)
