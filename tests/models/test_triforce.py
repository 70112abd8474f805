"""TriForce: both levels guess, and what comes out is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import SamplingParams
from headrace.contracts.step import SampleState
from headrace.errors import ConfigurationError
from tests.exec.chi_square import chi_square
from tests.models.drafting import (
    accepted,
    expected_texts,
    largest_difference,
    listen,
    save_similar,
)
from tests.models.expected import TOLERANCE, Expected, greedy, load, prompt_of

REFERENCE: dict[str, Any] = {"reference": True, "block_size": 4}


@pytest.fixture(scope="module")
def expected(expectations: Callable[[str], Expected]) -> Expected:
    return expectations("llama3")


@pytest.fixture(scope="module")
def similar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_similar(tmp_path_factory.mktemp("similar"))


def method(model: Path, **options: Any) -> str:
    listed = {"model": model, "adaptive": "false", "window": 64, **options}
    return "triforce:" + ",".join(f"{key}={value}" for key, value in listed.items())


def completions(outputs: Any) -> list[Any]:
    return [(c.token_ids, c.logprobs) for output in outputs for c in output.outputs]


def test_greedy_tokens_are_the_same(expected: Expected, similar: Path) -> None:
    """With few pages and many, small models that are right and wrong, chunks and plain rows."""
    prompts = [prompt_of(length) for length in (50, 9, 30)]
    options = {**REFERENCE, "max_num_batched_tokens": 24}
    with load(expected.directory, **options) as llm:
        plain = llm.generate(prompts, greedy(18, logprobs=1))
    shares = []
    for chosen in (
        method(similar, budget=8, refresh=5),
        method(similar, budget=1000, small_length=3),
        method(expected.directory, budget=32, length=4),
    ):
        with load(expected.directory, methods=(chosen,), **options) as llm:
            drafted = llm.generate(prompts, greedy(18, logprobs=1), methods=[None, None, {}])
            llm.engine.check_integrity()
            assert llm.stats().pages_used == 0
        assert completions(drafted) == completions(plain)
        right, tried = accepted(drafted)
        assert tried > 20 and accepted(drafted[2:]) == (0, 0)
        shares.append(right / tried)
    assert 0 < shares[0] < shares[2] < 1
    assert shares[1] == 1, "all pages are the model itself"


def test_fewer_passes_than_tokens(expected: Expected, similar: Path) -> None:
    """The small model's guesses spare passes over chosen pages."""
    passes = {}
    for small in (similar, expected.directory):
        with load(expected.directory, methods=(method(small),), **REFERENCE) as llm:
            drafter: Any = llm.methods.drafters["triforce"]
            target, kept = drafter._parts.target, drafter._parts.target.hidden
            calls: list[int] = []

            def counted(rows: Any, *rest: Any, kept: Any = kept, calls: Any = calls) -> Any:
                calls.append(sum(len(row.input_ids) for row in rows))
                return kept(rows, *rest)

            target.hidden = counted
            [output] = llm.generate([prompt_of(40)], greedy(22))
        assert accepted([output]) == (18, 18)
        passes[small] = len(calls)
    assert passes[expected.directory] == 3 * 2, "two guesses and one more token, twice in a step"
    assert 3 * 2 < passes[similar] < 18


def test_the_small_model_sees_the_text(expected: Expected, similar: Path) -> None:
    """What it guessed wrong is gone, and so is what the level above it had wrong."""
    chosen = method(similar, budget=16, small_length=3)
    with load(expected.directory, methods=(chosen,), block_size=4) as llm:
        drafter: Any = llm.methods.drafters["triforce"]
        heard = listen(drafter._small)
        outputs = llm.generate([prompt_of(30), prompt_of(23)], greedy(20))
    right, tried = accepted(outputs)
    assert 0 < right < tried
    assert len(heard) > 20
    assert largest_difference(similar, heard) < TOLERANCE


def test_preemption_and_siblings(expected: Expected, similar: Path) -> None:
    prompts = [prompt_of(20, seed) for seed in range(4)]
    params = greedy(16, n=2)
    with load(expected.directory, **REFERENCE) as llm:
        plain = llm.generate(prompts, params)
    memory = {**REFERENCE, "kv_cache_memory_bytes": expected.cache_bytes(84)}
    chosen = method(similar, budget=8, refresh=5)
    with load(expected.directory, methods=(chosen,), **memory) as llm:
        drafted = llm.generate(prompts, params)
        llm.engine.check_integrity()
        assert llm.stats().preemptions > 0
    assert completions(drafted) == completions(plain)
    assert accepted(drafted)[0] > 0


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_fast_operations_give_the_same_tokens(
    expected: Expected, similar: Path, cache: str
) -> None:
    prompts = [prompt_of(length) for length in (60, 33)]
    options = {"block_size": 4, "kv_cache_dtype": cache}
    with load(expected.directory, **options) as llm:
        plain = llm.generate(prompts, greedy(16))
    with load(expected.directory, methods=(method(similar, budget=24),), **options) as llm:
        drafted = llm.generate(prompts, greedy(16))
    assert completions(drafted) == completions(plain)
    assert accepted(drafted)[0] > 0


def test_sampled_texts_are_distributed_as_without_guesses(
    expected: Expected, similar: Path
) -> None:
    prompt, length = prompt_of(21), 4
    options = {"max_tokens": length, "ignore_eos": True, "detokenize": False}
    asked = {"top_k": 2, "temperature": 1.5, **options}
    params = [SamplingParams(seed=seed, **asked) for seed in range(500)]
    state = SampleState(params[0], prompt, [], 0)
    texts = expected_texts(expected, prompt, state, length)
    chosen = method(similar, budget=8, small_length=1)
    with load(expected.directory, methods=(chosen,), block_size=4) as llm:
        outputs = llm.generate([prompt] * len(params), params)
    assert chi_square([tuple(o.outputs[0].token_ids) for o in outputs], texts) < 5
    right, tried = accepted(outputs)
    assert 0.1 < right / tried < 0.95


def test_what_does_not_fit(
    expected: Expected, similar: Path, expectations: Callable[[str], Expected]
) -> None:
    windowed = expectations("gemma3_text").directory
    for directory, methods, message in (
        (windowed, (method(similar),), "triforce: needs layers that read all of the past"),
        (expected.directory, ("triforce",), "triforce: name the small model"),
        (expected.directory, (method(similar, budget=0),), "budget must be at least 1, got 0"),
        (
            expected.directory,
            (method(similar), f"draft-model:model={similar}"),
            "needs that a token that is fed belongs to its sequence, which .* breaks",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load(directory, methods=methods)
