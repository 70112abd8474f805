"""Speculative decoding: faster at most, never other tokens, or another distribution of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headrace import LLM, RequestOutput, SamplingParams
from headrace.contracts.step import SampleState
from headrace.errors import CheckpointError, ConfigurationError, InvalidRequestError
from tests.exec.chi_square import chi_square
from tests.models.drafting import (
    accepted,
    expected_texts,
    largest_difference,
    listen,
    save_other,
    save_similar,
)
from tests.models.expected import TOLERANCE, Expected, greedy, load, prompt_of
from tests.support.checkpoints import make_checkpoint, write_tokenizer

NAME = "draft-model"
REFERENCE: dict[str, Any] = {"reference": True, "block_size": 4}


@pytest.fixture(scope="module")
def expected(expectations: Callable[[str], Expected]) -> Expected:
    return expectations("llama3")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_other(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def similar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_similar(tmp_path_factory.mktemp("similar"))


def method(model: Path, **options: Any) -> str:
    listed = {"model": model, "adaptive": "false", **options}
    return f"{NAME}:" + ",".join(f"{key}={value}" for key, value in listed.items())


def run(
    expected: Expected, methods: tuple[str, ...], prompts: Any, params: Any, **options: Any
) -> list[RequestOutput]:
    chosen = options.pop("choices", None)
    with load(expected.directory, methods=methods, **options) as llm:
        outputs = llm.generate(prompts, params, methods=chosen)
        llm.engine.check_integrity()
        assert llm.stats().pages_used == 0
        assert accepted(outputs) == (llm.stats().accepted_tokens, llm.stats().draft_tokens)
    return outputs


def completions(outputs: list[RequestOutput]) -> list[Any]:
    return [(c.token_ids, c.logprobs, c.text) for output in outputs for c in output.outputs]


@pytest.mark.parametrize("kind", ["other", "similar", "itself"])
@pytest.mark.parametrize("window", [0, 24])
def test_greedy_tokens_and_logprobs_are_the_same(
    expected: Expected, kind: str, window: int, request: pytest.FixtureRequest
) -> None:
    """In steps with chunks and with rows that nobody guesses for."""
    draft = expected.directory if kind == "itself" else request.getfixturevalue(kind)
    prompts = [prompt_of(length) for length in (9, 30, 3, 17)]
    params = [greedy(count, logprobs=2) for count in (14, 9, 1, 2)]
    options = {**REFERENCE, "max_num_batched_tokens": 12}
    plain = run(expected, (), prompts, params, **options)
    methods = (method(draft, window=window),)
    for choices in (None, [None, {}, None, None]):
        drafted = run(expected, methods, prompts, params, choices=choices, **options)
        assert completions(drafted) == completions(plain)
        right, tried = accepted(drafted)
        assert tried > 5
        if kind == "itself" and window == 0:
            assert right == tried
        elif kind == "similar" and window == 0:
            assert 0 < right < tried


def test_fast_operations_give_the_same_tokens(expected: Expected, similar: Path) -> None:
    prompts = [prompt_of(length) for length in (9, 30, 17)]
    plain = run(expected, (), prompts, greedy(20))
    drafted = run(expected, (method(similar),), prompts, greedy(20))
    assert [c[0] for c in completions(drafted)] == [c[0] for c in completions(plain)]
    assert accepted(drafted)[0] > 0


@pytest.mark.parametrize("memory", [200, 40])
def test_the_small_model_sees_the_text(expected: Expected, similar: Path, memory: int) -> None:
    """What it guessed wrong is gone, also where sequences lose their pages and change places."""
    prompts = [prompt_of(6, seed) for seed in range(3)]
    options = {"block_size": 4, "kv_cache_memory_bytes": expected.cache_bytes(memory)}
    with load(expected.directory, methods=(method(similar),), **options) as llm:
        drafter: Any = llm.methods.drafters[NAME]
        heard = listen(drafter._model)
        outputs = llm.generate(prompts, greedy(14))
        assert (llm.stats().preemptions > 0) == (memory < 100)
    assert accepted(outputs)[0] > 0
    assert len(heard) > 20
    assert largest_difference(similar, heard) < TOLERANCE


def test_preempted_and_aborted_requests(expected: Expected, similar: Path) -> None:
    prompts = [prompt_of(12, seed) for seed in range(5)]
    plain = run(expected, (), prompts, greedy(24), **REFERENCE)
    memory = {**REFERENCE, "kv_cache_memory_bytes": expected.cache_bytes(64)}
    with load(expected.directory, methods=(method(similar),), **memory) as llm:
        llm.engine.add_request("given up", prompt_of(8), greedy(30))
        for _ in range(3):
            llm.engine.step()
        llm.engine.abort_request("given up")
        drafted = llm.generate(prompts, greedy(24))
        llm.engine.check_integrity()
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
    assert completions(drafted) == completions(plain)
    assert accepted(drafted)[0] > 0


def test_what_requests_ask_for(expected: Expected, similar: Path) -> None:
    """Several completions, scores of the prompt, minima, penalties, stops, the context's end."""
    prompt = prompt_of(10)
    [free] = run(expected, (), [prompt], greedy(20), **REFERENCE)
    text = free.outputs[0].token_ids
    shared = {"temperature": 0.0, "ignore_eos": True}
    params = [
        SamplingParams(n=3, max_tokens=12, prompt_logprobs=1, logprobs=0, **shared),
        SamplingParams(max_tokens=20, stop_token_ids=[text[5]], **shared),
        SamplingParams(max_tokens=20, stop_token_ids=[text[5]], min_tokens=9, **shared),
        SamplingParams(max_tokens=20, repetition_penalty=2.0, frequency_penalty=1.0, **shared),
        SamplingParams(max_tokens=20, logit_bias={text[3]: -100.0}, **shared),
        SamplingParams(max_tokens=None, **shared),
    ]
    options = {**REFERENCE, "max_model_len": 40}
    outputs = [
        run(expected, methods, [prompt] * len(params), params, **options)
        for methods in ((), (method(similar, length=5),))
    ]
    for plain, drafted in zip(*outputs, strict=True):
        assert completions([drafted]) == completions([plain])
        assert drafted.prompt_logprobs == plain.prompt_logprobs
        for one, two in zip(drafted.outputs, plain.outputs, strict=True):
            assert (one.finish_reason, one.stop_reason) == (two.finish_reason, two.stop_reason)
        assert accepted([drafted])[0] > 0


def test_strings_stop_inside_a_chain(expected: Expected) -> None:
    """What was accepted behind a stop string is not reported."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    [free] = run(expected, (), ["some text"], params, **REFERENCE)
    stop = free.outputs[0].text[4:6]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop)
    [plain] = run(expected, (), ["some text"], params, **REFERENCE)
    [drafted] = run(
        expected, (method(expected.directory, length=9),), ["some text"], params, **REFERENCE
    )
    assert completions([drafted]) == completions([plain])
    assert drafted.outputs[0].finish_reason == "stop"
    assert accepted([drafted]) == (9, 9)


@pytest.mark.parametrize(
    "asked",
    [{"top_k": 2, "temperature": 1.5}, {"top_k": 3, "top_p": 0.8, "repetition_penalty": 1.3}],
    ids=str,
)
def test_sampled_texts_are_distributed_as_without_guesses(
    expected: Expected, similar: Path, asked: dict[str, Any]
) -> None:
    prompt, length = prompt_of(5), 4
    options = {"max_tokens": length, "ignore_eos": True, "detokenize": False, **asked}
    params = [SamplingParams(seed=seed, **options) for seed in range(400)]
    state = SampleState(params[0], prompt, [], 0)
    texts = expected_texts(expected, prompt, state, length)
    outputs = run(expected, (method(similar),), [prompt] * len(params), params)
    assert chi_square([tuple(o.outputs[0].token_ids) for o in outputs], texts) < 5
    right, tried = accepted(outputs)
    assert 0.1 < right / tried < 0.9


def test_a_seed_gives_the_same_tokens_again(expected: Expected, similar: Path) -> None:
    prompts = [prompt_of(9), prompt_of(12)]
    params = SamplingParams(max_tokens=16, seed=7, top_k=4, ignore_eos=True, detokenize=False)
    adaptive = method(similar, adaptive="true")
    together = run(expected, (adaptive,), prompts, params, **REFERENCE)
    alone = [run(expected, (adaptive,), [prompt], params, **REFERENCE)[0] for prompt in prompts]
    assert completions(together) == completions(alone)
    assert all(accepted([output])[1] > 0 for output in together)


def test_a_request_chooses_how_much_is_guessed(expected: Expected) -> None:
    choices = [{NAME: {"length": length}} for length in (1, 3)]
    outputs = run(
        expected,
        (method(expected.directory),),
        [prompt_of(8)] * 2,
        greedy(9),
        choices=choices,
        **REFERENCE,
    )
    assert [accepted([output]) for output in outputs] == [(4, 4), (6, 6)]


def test_steered_requests(expected: Expected, similar: Path, tmp_path: Path) -> None:
    """What changes activations changes them where guesses are verified, too."""
    config = expected.model.config
    heads = config.num_attention_heads
    shape = (config.num_hidden_layers, heads, config.hidden_size // heads)
    file = tmp_path / "directions.safetensors"
    save_file({"one": torch.randn(shape, generator=torch.Generator().manual_seed(1))}, file)
    steering = f"inference-time-intervention:vectors={file},strength=0.5"
    prompts = [prompt_of(12), prompt_of(12)]
    choices: list[Any] = [None, {NAME: {}}]
    plain = run(
        expected, (steering,), prompts, greedy(16, logprobs=0), choices=[None, {}], **REFERENCE
    )
    methods = (steering, method(similar))
    drafted = run(expected, methods, prompts, greedy(16, logprobs=0), choices=choices, **REFERENCE)
    assert completions(drafted) == completions(plain)
    assert completions(drafted[:1]) != completions(drafted[1:])
    assert all(accepted([output])[1] > 0 for output in drafted)


def test_pages_are_shared_with_plain_requests(expected: Expected, similar: Path) -> None:
    """Guesses leave nothing behind, neither right ones nor wrong ones."""
    prompt = prompt_of(10)
    with load(expected.directory, methods=(method(similar),), **REFERENCE) as llm:
        [first] = llm.generate([prompt], greedy(16))
        longer = [*prompt, *first.outputs[0].token_ids]
        [plain] = llm.generate([longer], greedy(8, logprobs=1), methods={})
        assert plain.metrics is not None and plain.metrics.num_cached_tokens == 24
    with load(expected.directory, **REFERENCE) as llm:
        [alone] = llm.generate([longer], greedy(8, logprobs=1))
    assert completions([plain]) == completions([alone])


def test_a_row_that_is_not_finite_fails_alone(expected: Expected, similar: Path) -> None:
    with load(expected.directory, methods=(method(similar),)) as llm:
        sampler = llm.engine.runner.sampler  # type: ignore[attr-defined]
        kept = sampler.distributions

        def broken(logits: torch.Tensor, states: Any) -> Any:
            eight = [len(state.prompt_token_ids) == 8 for state in states]
            if sum(eight) > 1:
                logits[torch.tensor(eight)] = float("nan")
            return kept(logits, states)

        sampler.distributions = broken
        bad, good = llm.generate([prompt_of(8), prompt_of(9)], greedy(6))
        llm.engine.check_integrity()
    assert good.error is None and len(good.outputs[0].token_ids) == 6
    assert bad.error is not None and "not finite" in bad.error
    assert len(bad.outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "draft-model: name the small model"),
        ("model=x,length=0", "length must be at least 1, got 0"),
        ("model=x,window=-1", "window must not be negative"),
        ("model={directory},window=8", "it sees 8 tokens at most; that has to be 4 times sinks=4"),
    ],
)
def test_options_that_do_not_fit(expected: Expected, options: str, message: str) -> None:
    text = options.format(directory=expected.directory)
    with pytest.raises(ConfigurationError, match=message):
        load(expected.directory, methods=(f"{NAME}:{text}",))


def test_models_that_do_not_fit(expected: Expected, similar: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(expected.directory, methods=(method(tmp_path / "nothing"),))
    recurrent = make_checkpoint(tmp_path / "recurrent", "mamba2")
    with pytest.raises(ConfigurationError, match="it keeps a recurrent state"):
        load(expected.directory, methods=(method(recurrent),))
    with pytest.raises(ConfigurationError, match="some layers here have a recurrent state"):
        load(recurrent, methods=(method(similar),))
    write_tokenizer(similar_copy := make_checkpoint(tmp_path / "copy"), extra_tokens=3)
    with pytest.raises(ConfigurationError, match="has other tokens than the engine's model"):
        load(expected.directory, methods=(method(similar_copy),))


def test_what_does_not_go_together(expected: Expected, similar: Path) -> None:
    with pytest.raises(ConfigurationError, match="draft-model needs that the cache holds every"):
        load(expected.directory, kv="random-eviction", methods=(method(similar),))
    with pytest.raises(ConfigurationError, match="needs that a token that is fed belongs"):
        load(expected.directory, methods=(method(similar), "activation-recorder"))
    with (
        load(expected.directory, methods=(method(similar),)) as llm,
        pytest.raises(InvalidRequestError, match="length must be at least 1"),
    ):
        llm.generate([prompt_of(4)], greedy(1), methods={NAME: {"length": 0}})


def test_windows_of_the_engine_s_model(
    expectations: Callable[[str], Expected], tmp_path: Path
) -> None:
    expected = expectations("gemma3_text")
    prompts = [prompt_of(40), prompt_of(7)]
    plain = run(expected, (), prompts, greedy(24), **REFERENCE)
    draft = save_similar(tmp_path, "gemma3_text", noise=0.1)
    drafted = run(expected, (method(draft),), prompts, greedy(24), **REFERENCE)
    assert completions(drafted) == completions(plain)
    assert 0 < accepted(drafted)[0] < accepted(drafted)[1]


def test_counts_and_times_are_reported(expected: Expected) -> None:
    with load(expected.directory, methods=(method(expected.directory),)) as llm:
        llm.generate([prompt_of(8)], greedy(9))
        stats = llm.stats()
        assert (stats.drafts, stats.draft_tokens, stats.accepted_tokens) == (2, 6, 6)
        assert "draft" not in llm.engine.timings or llm.engine.timings["draft"] >= 0
        assert stats.generation_tokens == 9


def test_it_stops_where_it_does_not_pay(expected: Expected, other: Path) -> None:
    """A clock that makes steps with guesses four times as slow."""
    with load(expected.directory, methods=(method(other, adaptive="true"),)) as llm:
        tried = _drafts_on_a_slow_clock(llm)
    assert 8 <= tried < 16
    with load(expected.directory, methods=(method(other),)) as llm:
        assert _drafts_on_a_slow_clock(llm) > 50


def _drafts_on_a_slow_clock(llm: LLM) -> int:
    class SlowClock:
        time = 0.0

        def now(self) -> float:
            return self.time

    clock = SlowClock()
    runner = llm.engine.runner
    submit = runner.submit

    def slow(plan: Any, tables: Any) -> Any:
        clock.time += 4.0 if any(row.draft_room for row in plan.rows) else 1.0
        return submit(plan, tables)

    runner.submit = slow  # type: ignore[method-assign]
    llm.engine.clock = clock  # type: ignore[assignment]
    llm.generate([prompt_of(4)], greedy(60))
    return llm.stats().drafts
