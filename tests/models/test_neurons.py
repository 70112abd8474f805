"""Feed-forward in part: generated tokens go through the neurons that their prompt chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace import RequestOutput, SamplingParams
from headrace.config import EngineConfig
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.loading import quantize_model
from tests.models.expected import TOLERANCE, Expected, difference, greedy, load, prompt_of
from tests.support.adapters import write_adapter
from tests.support.logits import LogitsRecorder

NAME = "core-infer"
KEEP, CORE = 0.3, 0.25
METHOD = f"{NAME}:keep={KEEP},core={CORE}"


@pytest.fixture(params=("llama3", "llama-biases", "phi3", "gemma2"))
def expected(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Expected:
    """With biases, with gate and up stored as one, and with another activation and two norms."""
    return expectations(request.param)


def chosen_neurons(inner: Tensor, keep: float, core: float) -> list[int]:
    """Token by token, out of a prompt's activations ``[T, neurons]``."""
    counts = [0] * inner.shape[1]
    for token in inner.tolist():
        active = sorted((value, place) for place, value in enumerate(token) if value > 0)
        size = math.ceil(core * len(active))
        for _, place in active[len(active) - size :]:
            counts[place] += 1
    frequent = sorted(range(len(counts)), key=lambda place: (-counts[place], place))
    return frequent[: math.ceil(keep * len(counts))]


@contextmanager
def in_part(expected: Expected, prompt: int, keep: float, core: float) -> Iterator[None]:
    """The model of transformers; behind a prompt, inner neurons that it did not choose are 0."""

    def mask(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        inner = arguments[0].clone()
        kept = torch.zeros(inner.shape[2], dtype=torch.bool)
        kept[chosen_neurons(inner[0, :prompt], keep, core)] = True
        inner[0, prompt:, ~kept] = 0
        return (inner,)

    downs = [layer.mlp.down_proj for layer in expected.model.model.layers]
    handles = [down.register_forward_pre_hook(mask) for down in downs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def error(
    expected: Expected,
    recorder: LogitsRecorder,
    output: RequestOutput,
    keep: float = KEEP,
    core: float = CORE,
) -> float:
    """Largest difference from the reference; and there must be one from the model itself."""
    with in_part(expected, len(output.prompt_token_ids), keep, core):
        found = difference(expected, recorder, output)
    changed = difference(expected, recorder, output)
    assert (changed > 0.01) == (keep < 1), "in part where it should not be, or not at all"
    return found


@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["fast", "reference"])
def test_requests_of_one_batch_go_through_their_own_neurons(
    expected: Expected, options: dict[str, Any]
) -> None:
    """Chunks of prompts, plain requests and those with subsets of several sizes share steps."""
    prompts = [prompt_of(length) for length in (23, 9, 31, 1, 12, 14)]
    shares = [(KEEP, CORE), (0.1, 1.0), (1.0, 1.0), (0.6, 0.1), (KEEP, CORE), (1.0, CORE)]
    choices: list[Any] = [{NAME: {"keep": keep, "core": core}} for keep, core in shares]
    choices[2], choices[4] = {}, None
    with load(expected.directory, methods=(METHOD,), max_num_batched_tokens=16, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(6), methods=choices)
    for output, (keep, core) in zip(outputs, shares, strict=True):
        assert error(expected, recorder, output, keep, core) < TOLERANCE
    assert any(row.is_chunk for step in recorder.steps for row in step)
    mixed = [step for step in recorder.steps if {row.is_decode for row in step} == {True, False}]
    assert mixed, "prompts and generated tokens never shared a step"


def test_completions_of_one_prompt(expected: Expected) -> None:
    """Forks take what was chosen along; one that waits for a row computes the prompt again."""
    params = SamplingParams(n=4, seed=0, max_tokens=6, ignore_eos=True, detokenize=False)
    for rows in (8, 2):
        with load(expected.directory, methods=(METHOD,), max_num_seqs=rows) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate([prompt_of(17), prompt_of(9)], params, methods=[None, {}])
        assert len({tuple(each.token_ids) for each in outputs[0].outputs}) > 1
        assert error(expected, recorder, outputs[0]) < TOLERANCE
        assert difference(expected, recorder, outputs[1]) < TOLERANCE


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_preempted_sequences_come_out_the_same(
    expectations: Callable[[str], Expected], name: str
) -> None:
    """A prompt that is computed again goes through all neurons, what was generated does not."""
    expected = expectations(name)
    prompts = [prompt_of(20, seed) for seed in range(4)]
    memory = expected.cache_bytes(90)
    options = {"methods": (METHOD,), "block_size": 4, "kv_cache_memory_bytes": memory}
    with load(expected.directory, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(24), methods=[None, {}, None, None])
        assert llm.stats().preemptions > 0
        llm.engine.check_integrity()
    resumed = [row for step in recorder.steps for row in step if row.past == 20 and row.inputs > 1]
    assert resumed, "no prompt's end was a chunk's end"
    for index, output in enumerate(outputs):
        if index == 1:
            assert difference(expected, recorder, output) < TOLERANCE
        else:
            assert error(expected, recorder, output) < TOLERANCE


def test_what_is_shared(expectations: Callable[[str], Expected]) -> None:
    """Requests with the method see all of their prompt; plain ones share pages as ever."""
    expected = expectations("llama3")
    prompt = prompt_of(18)
    with load(expected.directory, methods=(METHOD,), block_size=4) as llm:
        assert llm.model_info.prefix_caching
        for choice, cached in ((None, 0), (None, 0), ({}, 0), ({}, 16), (None, 0)):
            [output] = llm.generate([prompt], greedy(10), methods=choice)
            assert output.metrics is not None
            assert output.metrics.num_cached_tokens == cached
        # The prompt's four full pages, of the method and of plain requests; of the latter, also
        # those with what was generated.
        assert llm.stats().pages_cached == 4 + 6
        assert llm.stats().pages_used == 0


def test_plain_requests_compute_what_they_compute_without_the_method(
    expectations: Callable[[str], Expected],
) -> None:
    expected = expectations("llama3")
    prompts = [prompt_of(length) for length in (23, 9)]
    found = []
    for methods in ((), (METHOD,)):
        with load(expected.directory, methods=methods) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate(prompts, greedy(6), methods=[{}, {}])
            found.append([recorder.logits(output) for output in outputs])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_in_half_precision(expectations: Callable[[str], Expected], keep: float) -> None:
    """Rounding may change the choice among neurons that are equally frequent, and little else."""
    expected = expectations("llama3")
    choice = {NAME: {"keep": keep, "core": 1.0}}
    with load(expected.directory, dtype="bfloat16", methods=(METHOD,)) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate([prompt_of(12), prompt_of(9)], greedy(6), methods=[choice, {}])
    with in_part(expected, 12, keep, 1.0):
        found = difference(expected, recorder, outputs[0])
    changed = difference(expected, recorder, outputs[0])
    assert found < (0.1 if keep == 1 else changed / 3)
    assert difference(expected, recorder, outputs[1]) < 0.1


def test_beside_methods_of_other_kinds(expectations: Callable[[str], Expected]) -> None:
    """Of all neurons, whichever methods come with it, the result is as without it."""
    expected = expectations("llama3")
    prompts = [prompt_of(length) for length in (40, 33)]
    found = []
    for methods in (("activation-recorder",), ("activation-recorder", f"{NAME}:keep=1")):
        options = {"block_size": 4, "kv": "random-eviction:keep=0.5", "methods": methods}
        with load(expected.directory, **options, max_num_batched_tokens=16) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate(prompts, greedy(20))
            found.append([recorder.logits(output) for output in outputs])
    for pair in zip(*found, strict=True):
        assert (pair[0] - pair[1]).abs().max() < TOLERANCE


def test_the_weights_are_counted(expectations: Callable[[str], Expected]) -> None:
    expected = expectations("llama3")
    with load(expected.directory) as plain, load(expected.directory, methods=(METHOD,)) as llm:
        config = expected.model.config
        more = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size * 4
        assert llm.model_info.weight_bytes == plain.model_info.weight_bytes + more


def test_scores_of_a_prompt_are_the_models(expectations: Callable[[str], Expected]) -> None:
    expected = expectations("llama3")
    prompt = prompt_of(18)
    found = []
    for methods in ((), (METHOD,)):
        with load(expected.directory, methods=methods) as llm:
            [output] = llm.generate([prompt], greedy(3, prompt_logprobs=0))
            found.append(output.prompt_logprobs)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen2_moe", "mamba2"])
def test_models_without_a_gated_feed_forward_are_refused(
    expectations: Callable[[str], Expected], name: str
) -> None:
    message = f"method: {NAME}: needs a gated feed-forward in every layer"
    with pytest.raises(ConfigurationError, match=message):
        load(expectations(name).directory, methods=(METHOD,))


def test_packed_checkpoints_are_refused(
    expectations: Callable[[str], Expected], tmp_path: Path
) -> None:
    source = EngineConfig(str(expectations("llama3").directory), weights="w8a8", num_threads=1)
    quantize_model(source, tmp_path / "packed")
    with pytest.raises(ConfigurationError, match=f"method: {NAME}: needs plain weights"):
        load(tmp_path / "packed", methods=(METHOD,))


def test_beside_quantized_weights(expectations: Callable[[str], Expected]) -> None:
    """What goes through some neurons has weights in int8 as well."""
    expected = expectations("llama3")
    options = {"weights": "w8a8", "head_weights": "bf16", "methods": (f"{NAME}:keep=1",)}
    with load(expected.directory, **options) as llm:
        recorder = LogitsRecorder(llm)
        [output] = llm.generate([prompt_of(12)], greedy(6))
        assert 0 < difference(expected, recorder, output) < 0.5
    config = expected.model.config
    rows = config.num_hidden_layers * 3 * config.intermediate_size
    with load(expected.directory, **{**options, "methods": ()}) as plain:
        more = llm.model_info.weight_bytes - plain.model_info.weight_bytes
    assert more == rows * (config.hidden_size + 4), "a byte for a weight, a scale for a row"


def test_embeddings_are_the_models(expectations: Callable[[str], Expected]) -> None:
    directory = expectations("llama3").directory
    with load(directory) as plain, load(directory, methods=(METHOD,)) as llm:
        found = [each.embed([prompt_of(9)])[0].embedding for each in (plain, llm)]
    assert np.array_equal(*found)


def test_adapters_beside_it_are_refused(
    expectations: Callable[[str], Expected], tmp_path: Path
) -> None:
    expected = expectations("llama3")
    adapter = write_adapter(expected.directory, tmp_path / "tuned", 1)
    with load(expected.directory, methods=(METHOD,), adapters={"tuned": adapter}) as llm:
        with pytest.raises(InvalidRequestError, match=f"adapter: {NAME} computes with the weights"):
            llm.generate([prompt_of(4)], greedy(1), adapter="tuned")
        recorder = LogitsRecorder(llm)
        prompts = [prompt_of(9), prompt_of(11)]
        outputs = llm.generate(prompts, greedy(6), adapter=["tuned", None], methods=[{}, None])
        [alone] = llm.generate(prompts[:1], greedy(6), adapter="tuned", methods={})
    assert error(expected, recorder, outputs[1]) < TOLERANCE
    assert outputs[0].outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("keep=0", "keep must be above 0 and at most 1, got 0.0"),
        ("core=1.5", "core must be above 0 and at most 1, got 1.5"),
        ("keep=nan", "keep must be above 0 and at most 1, got nan"),
    ],
)
def test_shares_out_of_range(options: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"method: {NAME}: {message}"):
        load(Path("/nowhere"), methods=(f"{NAME}:{options}",))
