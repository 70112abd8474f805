"""Options made from dataclasses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import typer

from headrace.cli.app import app
from headrace.cli.options import ENGINE, SAMPLING, parse_bytes, takes
from headrace.config import EngineConfig
from headrace.contracts.sampling import SamplingParams


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1073741824", 1 << 30),
        ("2GiB", 2 << 30),
        ("2gb", 2 << 30),
        ("1.5M", 3 << 19),
        ("64 KiB", 1 << 16),
        ("7b", 7),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "-1", "GiB", "2 PiB", "1e9", "two"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="2GiB"):
        parse_bytes(text)


def parameters(*path: str) -> dict[str, Any]:
    """The options of a command, by name."""
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.parametrize(
    "path", [("run",), ("serve",), ("doctor",), ("bench", "latency"), ("bench", "throughput")]
)
def test_every_engine_option_is_there_and_explained(path: tuple[str, ...]) -> None:
    found = parameters(*path)
    for field in fields(EngineConfig):
        assert found[field.name].help, field.name


def test_run_takes_the_request_fields() -> None:
    found = parameters("run")
    omitted = {"n", "logit_bias", "logprobs", "prompt_logprobs", "detokenize"}
    assert omitted.isdisjoint(found)
    for field in fields(SamplingParams):
        if field.name not in omitted:
            assert f"--{field.name.replace('_', '-')}" in found[field.name].opts


def received(*arguments: str) -> dict[str, Any]:
    """What a command with both sets gets."""
    seen: dict[str, Any] = {}
    program = typer.Typer()

    @program.command()
    @takes(engine=ENGINE, sampling=SAMPLING)
    def command(engine: dict[str, Any], sampling: dict[str, Any], word: str = "none") -> None:
        seen.update(engine=engine, sampling=sampling, word=word)

    typer.main.get_command(program).main(list(arguments), standalone_mode=False)
    return seen


def test_only_what_is_given_is_passed_on() -> None:
    assert received() == {"engine": {}, "sampling": {}, "word": "none"}


def test_values_reach_their_set() -> None:
    assert received(
        *("--word", "x", "--temperature", "0", "--stop", "a", "--stop", "b", "--ignore-eos"),
        *("--stop-token-ids", "7", "--no-skip-special-tokens", "--kv-cache-memory", "1KiB"),
        *("--no-prefix-caching", "--threads", "3", "--memory-utilization", "0.25"),
    ) == {
        "word": "x",
        "sampling": {
            "temperature": 0.0,
            "stop": ["a", "b"],
            "stop_token_ids": [7],
            "ignore_eos": True,
            "skip_special_tokens": False,
        },
        "engine": {
            "kv_cache_memory_bytes": 1024,
            "enable_prefix_caching": False,
            "num_threads": 3,
            "memory_utilization": 0.25,
        },
    }


def test_a_field_of_both_sets_is_one_option() -> None:
    seen = received("--seed", "5")
    assert seen["engine"] == seen["sampling"] == {"seed": 5}
