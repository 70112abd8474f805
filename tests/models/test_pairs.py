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

from headrace.contracts.kv_codec import KVCodec
from headrace.contracts.method import conflict
from headrace.errors import ConfigurationError
from headrace.kv.codecs.gear import Gear
from headrace.methods import find_method, known_methods
from tests.models import louder
from tests.models.drafting import accepted, save_similar
from tests.models.expected import Expected, greedy, load, prompt_of, save_deep
from tests.models.louder import Louder
from tests.models.test_early_exit import METHOD as EARLY_EXIT
from tests.models.test_early_exit import check, middle_threshold
from tests.models.test_kv_codecs import GEAR, coded_logits
from tests.models.test_kv_codecs import TOLERANCE as CODED_TOLERANCE
from tests.models.test_neurons import chosen_neurons
from tests.models.test_slim_infer import METHOD as PRUNING
from tests.models.test_slim_infer import OPTIONS as PRUNING_OPTIONS
from tests.models.test_slim_infer import PrunedModel, pruned_logits
from tests.models.test_slot_policies import KV as SCISSORHANDS
from tests.models.test_slot_policies import reduced_logits
from tests.models.test_steering import attention_shape, steered
from tests.support.logits import LogitsRecorder

TOLERANCE = 2e-4
LOUDER = louder.__file__
OPTIONS: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def expected(expectations: Callable[[str], Expected]) -> Expected:
    return expectations("llama3")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """With layers for several stages."""
    return save_deep(tmp_path_factory.mktemp("deep"))


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


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize(
    ("kv", "codec", "tolerance"),
    [
        # Entries near the middle of two levels may be rounded to either, in six layers.
        (GEAR, Gear(bits=4, unit=16, outliers=0.2), 20 * CODED_TOLERANCE),
        (f"{LOUDER}:Louder", Louder(), CODED_TOLERANCE),
    ],
    ids=["gear", "louder"],
)
def test_coded_caches_of_pruned_prompts(
    deep: Expected, kv: str, codec: KVCodec, tolerance: float, reference: bool
) -> None:
    """What is left in each layer is coded at its own pace; beside requests with one of them."""
    lengths = (75, 97, 50, 64, 30)
    coded, pruned, both = {codec.name(): {}}, {"slim-infer": {}}, None
    choices: list[Any] = [both, coded, pruned, both, {}]
    params = [greedy(20), greedy(9), greedy(20), greedy(9, n=2), greedy(9)]
    options = {**PRUNING_OPTIONS, "reference": reference}
    with load(deep.directory, kv=kv, methods=(PRUNING,), **options) as llm:
        recorder = LogitsRecorder(llm)
        prompts = [prompt_of(length) for length in lengths]
        outputs = llm.generate(prompts, params, methods=choices)
        llm.engine.check_integrity()
        assert llm.stats().pages_used == 0
    coding = {"codec": codec, "unit": 16}
    for output, choice in zip(outputs, choices, strict=True):
        prompt = output.prompt_token_ids
        tokens = [*prompt, *output.outputs[0].token_ids]
        if choice in (both, pruned):
            with_and_without = [pruned_logits(deep, output, **coding), pruned_logits(deep, output)]
        else:
            logits = coded_logits(deep, tokens, codec), deep.logits(tokens)
            with_and_without = [each[len(prompt) - 1 : -1] for each in logits]
        errors = [(recorder.logits(output) - each).abs().max() for each in with_and_without]
        wanted, other = errors if choice in (both, coded) else errors[::-1]
        assert wanted < tolerance
        assert other > 50 * CODED_TOLERANCE


def test_coded_caches_of_pruned_prompts_take_fewer_pages(deep: Expected) -> None:
    peaks = []
    for methods in ((), (PRUNING,)):
        with load(deep.directory, kv=GEAR, methods=methods, **PRUNING_OPTIONS) as llm:
            llm.generate([prompt_of(170)], greedy(20))
            peaks.append(llm.stats().pages_peak * llm.engine.runner.arena.layout.page_bytes)
    assert peaks[1] < 0.7 * peaks[0]


def test_preempted_sequences_of_pruned_prompts_and_coded_caches(deep: Expected) -> None:
    prompts = [prompt_of(75, seed) for seed in range(3)]
    options = {**PRUNING_OPTIONS, "kv": GEAR, "methods": (PRUNING,), "reference": True}
    with load(deep.directory, **options) as llm:
        alone = [llm.generate([prompt], greedy(30, logprobs=1))[0] for prompt in prompts]
        peak = llm.stats().pages_peak * llm.engine.runner.arena.layout.page_bytes
    with load(deep.directory, kv_cache_memory_bytes=int(1.6 * peak), **options) as llm:
        together = llm.generate(prompts, greedy(30, logprobs=1))
        assert llm.stats().preemptions > 0 == llm.stats().pages_used
        llm.engine.check_integrity()
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


@contextmanager
def steered_in_part(model: PrunedModel, direction: Tensor, prompt: int) -> Iterator[None]:
    """Heads are moved from the prompt's last token on; behind it, neurons that what a layer has of
    the prompt did not choose are 0.
    """
    seen: list[list[Tensor]] = [[] for _ in direction]

    def move(layer: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            out = arguments[0].clone()
            out[model.positions >= prompt - 1] += 0.5 * direction[layer].flatten()
            return (out,)

        return hook

    def mask(layer: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            inner = arguments[0].clone()
            if model.positions[0] < prompt:
                seen[layer].append(inner)
            else:
                kept = torch.zeros(inner.shape[1], dtype=torch.bool)
                kept[chosen_neurons(torch.cat(seen[layer]), 0.3, 0.25)] = True
                inner[:, ~kept] = 0
            return (inner,)

        return hook

    handles = []
    for index, layer in enumerate(model.model.model.layers):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(move(index)))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(mask(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_pruned_prompts_of_steered_requests_with_some_neurons(
    deep: Expected, tmp_path: Path, reference: bool
) -> None:
    direction = direction_for(deep)
    methods = (PRUNING, steering_by(direction, tmp_path), "core-infer:keep=0.3,core=0.25")
    options = {**PRUNING_OPTIONS, "reference": reference}
    with load(deep.directory, methods=methods, **options) as llm:
        recorder = LogitsRecorder(llm)
        choices: list[Any] = [None, {}, {"slim-infer": {}}]
        prompts = [prompt_of(length) for length in (75, 20, 40)]
        outputs = llm.generate(prompts, greedy(9), methods=choices)
        llm.engine.check_integrity()
    wanted = [
        pruned_logits(deep, outputs[0], beside=lambda model: steered_in_part(model, direction, 75)),
        deep.sampled_logits(outputs[1]),
        pruned_logits(deep, outputs[2]),
    ]
    for output, logits in zip(outputs, wanted, strict=True):
        assert (recorder.logits(output) - logits).abs().max() < TOLERANCE


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
