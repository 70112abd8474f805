"""Methods of different kinds in one request: each does what it does alone, at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.contracts.method import conflict
from headrace.errors import ConfigurationError
from headrace.methods import find_method, known_methods
from tests.models.drafting import accepted, save_similar
from tests.models.expected import Expected, greedy, load, prompt_of
from tests.models.test_early_exit import METHOD as EARLY_EXIT
from tests.models.test_early_exit import check, middle_threshold, save_deep
from tests.models.test_kv_codecs import GEAR, coded_logits
from tests.models.test_kv_codecs import TOLERANCE as CODED_TOLERANCE
from tests.models.test_neurons import chosen_neurons
from tests.models.test_slot_policies import KV as SCISSORHANDS
from tests.models.test_slot_policies import reduced_logits
from tests.models.test_steering import attention_shape, steered
from tests.support.logits import LogitsRecorder

TOLERANCE = 2e-4
OPTIONS: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def expected(expectations: Callable[[str], Expected]) -> Expected:
    return expectations("llama3")


@pytest.fixture(scope="module")
def direction(expected: Expected) -> Tensor:
    return direction_for(expected)


def direction_for(expected: Expected) -> Tensor:
    """Any direction in the heads of a model."""
    return torch.randn(attention_shape(expected), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def steering(direction: Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    return steering_by(direction, tmp_path_factory.mktemp("vectors"))


def steering_by(direction: Tensor, directory: Path) -> str:
    """The method and its options; the direction is written to the directory."""
    file = directory / "direction.safetensors"
    save_file({"direction": direction}, file)
    return f"inference-time-intervention:vectors={file},strength=0.5"


@contextmanager
def in_part(expected: Expected, prompt: int, keep: float, core: float) -> Iterator[None]:
    """The model of transformers, fed in parts; behind a prompt, neurons that it did not choose are
    0.
    """

    def masked() -> Any:
        seen: list[Tensor] = []

        def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            inner = arguments[0].clone()
            start = sum(map(len, seen))
            seen.append(inner[0])
            if start + inner.shape[1] > prompt:
                kept = torch.zeros(inner.shape[2], dtype=torch.bool)
                kept[chosen_neurons(torch.cat(seen)[:prompt], keep, core)] = True
                inner[0, max(0, prompt - start) :, ~kept] = 0
            return (inner,)

        return hook

    downs = [layer.mlp.down_proj for layer in expected.model.model.layers]
    handles = [down.register_forward_pre_hook(masked()) for down in downs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_slots_are_reduced_of_steered_requests(
    expected: Expected, direction: Tensor, steering: str
) -> None:
    prompts = [prompt_of(length) for length in (40, 9, 30)]
    choices: list[Any] = [None, {"scissorhands": {}}, {}]
    with load(expected.directory, kv=SCISSORHANDS, methods=(steering,), **OPTIONS) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(24), methods=choices)
        llm.engine.check_integrity()
    for output, choice in zip(outputs, choices, strict=True):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        with ExitStack() as stack:
            if choice is None:
                prompt = len(output.prompt_token_ids)
                stack.enter_context(steered(expected, direction, 0.5, prompt))
            reduced = choice != {}
            logits = reduced_logits(expected, tokens) if reduced else expected.logits(tokens)
        wanted = logits[len(output.prompt_token_ids) - 1 : -1]
        assert (recorder.logits(output) - wanted).abs().max() < TOLERANCE


def test_coded_caches_of_requests_with_some_neurons(expected: Expected) -> None:
    prompts = [prompt_of(length) for length in (40, 9, 30)]
    choices: list[Any] = [None, {"core-infer": {}}, {}]
    methods = ("core-infer:keep=0.3,core=0.25",)
    with load(expected.directory, kv=GEAR, methods=methods, **OPTIONS) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(24), methods=choices)
        llm.engine.check_integrity()
    codec: Any = find_method("gear")(bits=4, unit=16, outliers=0.2)
    for output, choice in zip(outputs, choices, strict=True):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        prompt = len(output.prompt_token_ids)
        with ExitStack() as stack:
            if choice != {}:
                stack.enter_context(in_part(expected, prompt, 0.3, 0.25))
            coded = choice is None
            logits = coded_logits(expected, tokens, codec) if coded else expected.logits(tokens)
        found = recorder.logits(output)
        assert (found - logits[prompt - 1 : -1]).abs().max() < CODED_TOLERANCE


def test_guesses_of_steered_requests(
    expected: Expected, direction: Tensor, steering: str, tmp_path: Path
) -> None:
    """Greedy tokens are those of the steered model, and each level is steered."""
    drafting = f"triforce:model={save_similar(tmp_path)},adaptive=false,window=64,budget=16"
    prompts = [prompt_of(length) for length in (50, 9, 30)]
    options = {"reference": True, "block_size": 4}
    with load(expected.directory, methods=(steering,), **options) as llm:
        alone = llm.generate(prompts, greedy(18, logprobs=1), methods=[None, None, {}])
    with load(expected.directory, methods=(steering, drafting), **options) as llm:
        choices: list[Any] = [None, None, {"triforce": {}}]
        drafted = llm.generate(prompts, greedy(18, logprobs=1), methods=choices)
        llm.engine.check_integrity()
    assert accepted(drafted)[0] > 0
    for one, other in zip(alone, drafted, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
    output = drafted[0]
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with steered(expected, direction, 0.5, len(output.prompt_token_ids)):
        best = expected.logits(tokens)[len(output.prompt_token_ids) - 1 : -1].argmax(-1)
    assert best.tolist() == output.outputs[0].token_ids
    assert best.tolist() != alone[2].outputs[0].token_ids


def test_exits_of_steered_requests(tmp_path: Path) -> None:
    deep = save_deep(tmp_path / "deep")
    direction, threshold = direction_for(deep), middle_threshold(deep)
    methods = (f"{EARLY_EXIT},threshold={threshold}", steering_by(direction, tmp_path))
    prompts = [prompt_of(length) for length in (40, 9, 30)]
    choices: list[Any] = [None, {"early-exit": {}}, {}]
    with load(deep.directory, methods=methods, **OPTIONS) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(24), methods=choices)
        llm.engine.check_integrity()
    left = 0
    for output, choice in zip(outputs, choices, strict=True):
        with ExitStack() as stack:
            if choice is None:
                prompt = len(output.prompt_token_ids)
                stack.enter_context(steered(deep, direction, 0.5, prompt))
            depths = check(deep, recorder, output, 2.0 if choice == {} else threshold)
        left += min(depths) < len(deep.model.model.layers)
    assert left == 2


def test_exact_methods_change_nothing_of_others(
    expected: Expected, steering: str, tmp_path: Path
) -> None:
    """Guesses and placement leave what a lossy method computes as it was, bit for bit."""
    guesses = f"draft-model:model={save_similar(tmp_path)},adaptive=false"
    placement = f"flexgen:memory=1200KiB,directory={tmp_path}"
    neurons = "core-infer:keep=0.3,core=0.25"
    options = {"reference": True, "block_size": 4, "max_num_batched_tokens": 16}
    prompts = [prompt_of(length) for length in (50, 9, 30)]
    for lossy, exact in (
        (neurons, guesses),
        ("random-eviction:keep=0.5", placement),
        (steering, placement),
    ):
        found = []
        for methods in ((lossy,), (lossy, exact)):
            with load(expected.directory, methods=methods, **options) as llm:
                outputs = llm.generate(prompts, greedy(18, logprobs=1))
                llm.engine.check_integrity()
            found.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
        assert found[0] == found[1], exact


def test_every_pair_composes_or_is_refused_with_a_reason() -> None:
    """What cards say of pairs is symmetric, and names a property."""
    kinds = [find_method(name) for name in known_methods()]
    together = 0
    for first in kinds:
        for second in kinds:
            if first is second:
                continue
            pair = [_unchecked(first), _unchecked(second)]
            reason = conflict(pair)
            assert (reason is None) == (conflict(pair[::-1]) is None)
            together += reason is None
            assert reason is None or (first.name() in reason and second.name() in reason)
    assert 0 < together < len(kinds) * (len(kinds) - 1)


def _unchecked(kind: type[Any]) -> Any:
    """A method whose options nobody looks at."""
    return object.__new__(kind)


def test_a_refused_pair(expected: Expected) -> None:
    with pytest.raises(ConfigurationError, match=r"(gear|h2o) needs that .*, which (gear|h2o)"):
        load(expected.directory, kv=GEAR, methods=("h2o",), **OPTIONS)
