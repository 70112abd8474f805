"""Taps: activations are changed for the requests that ask for it, as transformers computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace import LLM
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.exec.steering.activation_recorder import Recorder
from headrace.exec.steering.inference_time_intervention import fit_direction
from tests.models.expected import TOLERANCE, Expected, greedy, load, prompt_of
from tests.support.logits import LogitsRecorder

NAME = "inference-time-intervention"
TOKENS = 5


@pytest.fixture(params=("llama3", "qwen3"))
def expected(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Expected:
    """Two configurations, of which one has head norms."""
    return expectations(request.param)


def attention_shape(expected: Expected) -> tuple[int, int, int]:
    config = expected.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_attention_heads, width


@pytest.fixture
def directions(expected: Expected) -> dict[str, Tensor]:
    """Two directions, of some heads of all layers and of one head of one."""
    shape = attention_shape(expected)
    first = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    first[:, 0] = 0
    second = torch.zeros(shape)
    second[-1, 1] = torch.randn(shape[-1], generator=torch.Generator().manual_seed(2))
    return {"first": first, "second": second}


@pytest.fixture
def vectors(directions: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "directions.safetensors"
    save_file(directions, path)
    return path


@contextmanager
def steered(expected: Expected, direction: Tensor, strength: float, prompt: int) -> Iterator[None]:
    """The model of transformers with the heads' outputs moved from the prompt's last token on."""

    def move(layer: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            out = arguments[0].clone()
            out[:, prompt - 1 :] += strength * direction[layer].flatten()
            return (out,)

        return hook

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(move(index))
        for index, layer in enumerate(expected.model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choice(direction: str, strength: float) -> dict[str, dict[str, Any]]:
    return {NAME: {"direction": direction, "strength": strength}}


@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["fast", "reference"])
def test_requests_of_one_batch_are_steered_apart(
    expected: Expected, directions: dict[str, Tensor], vectors: Path, options: dict[str, Any]
) -> None:
    prompts = [prompt_of(length) for length in (23, 9, 31, 9)]
    choices = [choice("first", 0.5), choice("second", -2.0), {}, choice("first", 0)]
    method = f"{NAME}:vectors={vectors},direction=first"
    with load(expected.directory, methods=(method,), max_num_batched_tokens=16, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(TOKENS), methods=choices)
    for output, chosen in zip(outputs, choices, strict=True):
        wanted = chosen.get(NAME, {"direction": "first", "strength": 0.0})
        direction, strength = directions[wanted["direction"]], wanted["strength"]
        with steered(expected, direction, strength, len(output.prompt_token_ids)):
            should = expected.sampled_logits(output)
        found = recorder.logits(output)
        assert (found - should).abs().max() < TOLERANCE
        moved = (found - expected.sampled_logits(output)).abs().max()
        assert (moved > 0.01) == (strength != 0), "steered where it should not be, or not at all"


def test_steered_pages_are_not_shared(expected: Expected, vectors: Path) -> None:
    """The prompt but its last token is; what was generated is not, whoever asks."""
    method = f"{NAME}:vectors={vectors},direction=first,strength=0.5"
    prompt = prompt_of(16)
    with load(expected.directory, methods=(method,), block_size=4) as llm:
        [first] = llm.generate([prompt], greedy(12))
        longer = [*prompt, *first.outputs[0].token_ids]
        for asked, chosen, cached in (
            (longer, None, 12),
            (longer, {}, 0),
            (longer, {}, 24),
            (prompt, None, 12),
            (longer, choice("first", 1.0), 0),
        ):
            [output] = llm.generate([asked], greedy(1), methods=chosen)
            assert output.metrics is not None
            assert output.metrics.num_cached_tokens == cached
    with load(expected.directory, methods=(method,), enable_prefix_caching=False) as llm:
        [cold] = llm.generate([longer], greedy(1, logprobs=0))
    with load(expected.directory, methods=(method,), block_size=4) as llm:
        llm.generate([prompt], greedy(12))
        [warm] = llm.generate([longer], greedy(1, logprobs=0))
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name a file of directions"),
        ("vectors=/nowhere", "vectors: /nowhere cannot be read"),
        ("vectors={file}", "direction: choose one of first, second"),
        ("vectors={file},direction=third", "direction: 'third' is unknown; known: first, second"),
        ("vectors={narrow}", r"narrow is \[2, 4, 3\]; layer 0 of the model has heads of \[4, "),
    ],
)
def test_vectors_that_do_not_fit(
    expected: Expected, vectors: Path, tmp_path: Path, options: str, message: str
) -> None:
    narrow = tmp_path / "narrow.safetensors"
    save_file({"narrow": torch.ones(2, 4, 3)}, narrow)
    text = options.format(file=vectors, narrow=narrow)
    with pytest.raises(ConfigurationError, match=message):
        load(expected.directory, methods=(f"{NAME}:{text}",))


def test_wrong_choices_are_refused_at_admission(expected: Expected, vectors: Path) -> None:
    method = f"{NAME}:vectors={vectors},direction=first"
    with load(expected.directory, methods=(method,)) as llm:
        for wrong, message in (
            (choice("third", 1.0), "direction: 'third' is unknown; known: first, second"),
            ({NAME: {"vectors": "other"}}, "is not for requests; those that are: direction"),
            ({NAME: {"strength": "much"}}, "strength: must be of type float, got 'much'"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                llm.generate([prompt_of(4)], greedy(1), methods=wrong)
        assert llm.generate([prompt_of(4)], greedy(1))[0].error is None


def record(llm: LLM, prompts: list[list[int]]) -> Tensor:
    """What the heads say at the last token of each prompt, ``[prompts, layers, heads, width]``."""
    recorder = llm.methods.taps["activation-recorder"]
    assert isinstance(recorder, Recorder)
    found = []
    for prompt in prompts:
        llm.generate([prompt], greedy(1))
        kept = recorder.take()
        found.append(torch.stack([kept[layer][0] for layer in sorted(kept)]))
    return torch.stack(found)


def test_directions_are_found_and_work(expected: Expected, tmp_path: Path) -> None:
    """Texts of two kinds: strength moves what the heads say from one kind towards the other."""
    prompts = [[*prompt_of(6, seed), 3 if seed % 3 else 5] for seed in range(60)]
    labels = torch.tensor([prompt[-1] == 3 for prompt in prompts])
    with load(expected.directory, methods=("activation-recorder",)) as llm:
        outputs = record(llm, prompts)
    direction = fit_direction(outputs, labels, heads=2)
    assert (direction.norm(dim=-1) > 0).sum() == 2
    layer, head = (direction.norm(dim=-1) > 0).nonzero()[0].tolist()
    unit = torch.nn.functional.normalize(direction[layer, head], dim=0)
    along = outputs[:, layer, head] @ unit
    assert along[labels].mean() > along[~labels].mean()
    assert torch.isclose(direction[layer, head].norm(), along.std(), rtol=1e-4)
    file = tmp_path / "kind.safetensors"
    save_file({"kind": direction.contiguous()}, file)
    methods = (f"{NAME}:vectors={file},strength=3", "activation-recorder")
    with load(expected.directory, methods=methods) as llm:
        moved = record(llm, prompts)[:, layer, head] @ unit
    assert torch.allclose(moved - along, 3 * along.std(), atol=1e-3)
