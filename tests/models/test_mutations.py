"""The parity tests notice what they are for: switching one feature off breaks parity by far.

Every mutation is made to a copy of a checkpoint, which the engine then loads; it is compared with
transformers on the original.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.expected import Expected, difference, greedy, load, prompt_of
from tests.support.checkpoints import copy_checkpoint, edit_config, edit_tensors
from tests.support.logits import LogitsRecorder

NOTICED = 1e-2

Mutation = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


def config(**changed: Any) -> Mutation:
    return lambda directory: edit_config(directory, **changed)


def rope(**changed: Any) -> Mutation:
    def mutate(directory: Path) -> None:
        old = json.loads((directory / "config.json").read_text())["rope_parameters"]
        edit_config(directory, rope_parameters={**old, **changed})

    return mutate


def filled(suffix: str, value: float) -> Mutation:
    """All tensors whose names end so become constant."""

    def edit(tensors: Tensors) -> Tensors:
        assert any(name.endswith(suffix) for name in tensors), suffix
        return {
            name: torch.full_like(tensor, value) if name.endswith(suffix) else tensor
            for name, tensor in tensors.items()
        }

    return lambda directory: edit_tensors(directory, edit)


def exchanged(one: str, other: str) -> Mutation:
    """Tensors with ``one`` in their names trade places with those with ``other``."""

    def edit(tensors: Tensors) -> Tensors:
        return {
            name: tensors[name.replace(one, other) if one in name else name.replace(other, one)]
            for name in tensors
        }

    return lambda directory: edit_tensors(directory, edit)


def regrouped(directory: Path) -> None:
    """Query heads that shared a key head no longer do: 0, 2 | 1, 3 in place of 0, 1 | 2, 3."""

    def edit(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if ".q_proj." in name:
                tensors[name] = tensor.unflatten(0, (4, -1))[[0, 2, 1, 3]].flatten(0, 1)
            elif name.endswith(".o_proj.weight"):
                tensors[name] = tensor.unflatten(1, (4, -1))[:, [0, 2, 1, 3]].flatten(1, 2)
        return tensors

    edit_tensors(directory, edit)


def rescaled(directory: Path) -> None:
    """Scores are scaled by the width that heads would have if they divided the hidden size."""

    def edit(tensors: Tensors) -> Tensors:
        factor = (24 / 16) ** 0.5
        return {n: t * factor if "q_norm" in n else t for n, t in tensors.items()}

    edit_tensors(directory, edit)


def untied(directory: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        table = tensors["model.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": table.flip(0)}

    edit_config(edit_tensors(directory, edit), tie_word_embeddings=False)


ALL = ("llama2", "llama3-tied", "qwen2", "qwen3")
MUTATIONS: dict[str, tuple[tuple[str, ...], Mutation]] = {
    "rope scaling": (("llama3", "llama-linear"), rope(rope_type="default")),
    "rope factor": (("llama3", "llama-linear"), rope(factor=2.0)),
    "rope low frequencies": (("llama3",), rope(low_freq_factor=2.0)),
    "rope high frequencies": (("llama3",), rope(high_freq_factor=8.0)),
    "rope original context": (("llama3",), rope(original_max_position_embeddings=256)),
    "rope theta": (ALL, rope(rope_theta=10000.0)),
    "norm epsilon": (ALL, config(rms_norm_eps=1e-6)),
    "input norm": (ALL, filled("input_layernorm.weight", 1.0)),
    "post-attention norm": (ALL, filled("post_attention_layernorm.weight", 1.0)),
    "final norm": (ALL, filled("model.norm.weight", 1.0)),
    "query norm": (("qwen3", "qwen3-tied"), filled("q_norm.weight", 1.0)),
    "key norm": (("qwen3", "qwen3-tied"), filled("k_norm.weight", 1.0)),
    "query bias": (("llama-biases", "qwen2", "qwen3-tied"), filled("q_proj.bias", 0.0)),
    "key bias": (("llama-biases", "qwen2", "qwen3-tied"), filled("k_proj.bias", 0.0)),
    "value bias": (("llama-biases", "qwen2", "qwen3-tied"), filled("v_proj.bias", 0.0)),
    "output bias": (("llama-biases", "qwen3-tied"), filled("o_proj.bias", 0.0)),
    "gate bias": (("llama-biases",), filled("gate_proj.bias", 0.0)),
    "up bias": (("llama-biases",), filled("up_proj.bias", 0.0)),
    "down bias": (("llama-biases",), filled("down_proj.bias", 0.0)),
    "attention_bias": (("llama-biases", "qwen3-tied"), config(attention_bias=False)),
    "mlp_bias": (("llama-biases",), config(mlp_bias=False)),
    "gate before up": (ALL, exchanged("gate_proj", "up_proj")),
    "keys before values": (ALL, exchanged("k_proj", "v_proj")),
    "order of layers": (ALL, exchanged("layers.0.", "layers.1.")),
    "grouping of queries": (("llama3", "qwen2", "qwen3"), regrouped),
    "width of heads": (("qwen3",), rescaled),
    "tied head": (("llama3-tied", "qwen2-tied", "qwen3-tied"), untied),
    "untied head": (("llama2", "qwen2", "qwen3"), config(tie_word_embeddings=True)),
}


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        pytest.param(name, mutation, id=f"{feature}-{name}")
        for feature, (names, mutation) in MUTATIONS.items()
        for name in names
    ],
)
def test_mutation_breaks_parity(
    name: str,
    mutation: Mutation,
    expectations: Callable[[str], Expected],
    tmp_path: Path,
) -> None:
    expected = expectations(name)
    directory = copy_checkpoint(expected.directory, tmp_path / "mutated")
    mutation(directory)
    with load(directory) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(120)], greedy(4))
    assert difference(expected, recorder, output) > NOTICED
