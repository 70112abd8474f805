"""GGUF files of every architecture give the models what the original checkpoints give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from headrace.contracts.load_map import LoadMap
from headrace.json_file import read_json
from headrace.models.base import find_architecture
from headrace.ops.device import resolve_device
from headrace.ops.table import make_ops
from headrace.weights.absent_linear import AbsentLinear
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.gguf.architectures import ARCHITECTURES
from headrace.weights.gguf.checkpoint import GGUFCheckpoint
from headrace.weights.reader import Stack, WeightReader
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint
from tests.support.gguf_files import (
    RULES,
    RawTensor,
    convert_tensors,
    encoded,
    llama3_divisors,
    numbers,
    refusal,
    write_gguf,
)
from tests.support.gguf_models import CONFIGS, CONTEXT, WINDOW, stored_tensors

ROUNDED = ("norm.weight", "A_log")
"""Endings of tensors whose values the converter changes, in architectures in which it does."""


def test_all_architectures_are_tested() -> None:
    assert {RULES[name.split("-")[0]].architecture for name in CONFIGS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_the_original_ones(name: str, originals: Callable[[str], Path]) -> None:
    directory = originals(name)
    checkpoint = GGUFCheckpoint(directory / "model.gguf")
    expected = stored_tensors(directory)
    assert set(checkpoint) == set(expected) and len(checkpoint) == len(expected)
    for tensor, values in expected.items():
        assert tensor in checkpoint
        found = checkpoint.read(tensor, tuple(values.shape))
        assert found.shape == values.shape and found.is_contiguous()
        if name.startswith(("gemma", "mamba2", "falcon")) and tensor.endswith(ROUNDED):
            torch.testing.assert_close(found, values, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found, values), tensor


class Asked:
    """A ``WeightSource`` that keeps what a model asks for."""

    def __init__(self, checkpoint: Checkpoint, load_map: LoadMap) -> None:
        self._reader = WeightReader(checkpoint, load_map)  # type: ignore[arg-type]
        self.tensors: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        self.tensors[name] = self._reader.read(name, tuple(shape))
        return self.tensors[name].to(dtype or torch.float32)

    def vector(self, name: str, size: int) -> Tensor:
        return self.tensor(name, (size,))

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        self.tensor(f"{name}.weight", (rows, columns))
        return AbsentLinear().rows

    def head(self, name: str, rows: int, columns: int, *, bias: bool = False) -> AbsentLinear:
        return self.linear([name], [rows], columns, bias=bias)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        adaptable: bool = True,
        **options: Any,
    ) -> AbsentLinear:
        stack = Stack(names, rows, columns, **options)
        self.tensors[f"{stack.name}.weight"] = self._reader.weight(stack)
        bias = self._reader.bias(stack)
        if bias is not None:
            self.tensors[f"{stack.name}.bias"] = bias
        return AbsentLinear()


def asked(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What a model takes of a checkpoint."""
    model = find_architecture(checkpoint.config)
    source = Asked(checkpoint, model.load_map)
    model(checkpoint.config, source, make_ops(resolve_device("cpu"), "float32", threads=1))
    return source.tensors


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "falcon_h1"])
def test_models_load_unchanged(name: str, originals: Callable[[str], Path]) -> None:
    directory = originals(name)
    expected = asked(SafetensorsCheckpoint(directory))
    found = asked(GGUFCheckpoint(directory / "model.gguf"))
    assert found.keys() == expected.keys() and found
    for tensor, values in expected.items():
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=1e-6)


def turned(config: Mapping[str, Any]) -> Sequence[Tensor]:
    """Cosines and sines of a model's positions."""
    model: Any = find_architecture(dict(config))
    rotary = model.rotary(config, model.parse(config))
    cos, sin = rotary.cos_sin(torch.arange(CONTEXT), torch.float32)
    return cos, sin


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_the_original_ones(name: str, originals: Callable[[str], Path]) -> None:
    directory = originals(name)
    original = read_json(directory / "config.json")
    checkpoint = GGUFCheckpoint(directory / "model.gguf")
    found = checkpoint.config
    assert found["model_type"] == original["model_type"]
    model: Any = find_architecture(original)
    assert model.layer_states(found, "float32") == model.layer_states(original, "float32")
    shape, expected = model.shape(found), model.shape(original)
    assert shape == expected
    if name.startswith(("gpt2", "gpt_neox", "mamba2", "bert")):
        return
    assert model.parse(found) == model.parse(original)
    for values, wanted in zip(turned(found), turned(original), strict=True):
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-4)


FIELDS = {
    "gpt2": ("n_embd", "n_head", "n_layer", "layer_norm_epsilon", "activation_function"),
    "gpt_neox": ("hidden_size", "layer_norm_eps", "hidden_act", "use_parallel_residual"),
    "gpt_neox-sequential": ("intermediate_size", "use_parallel_residual", "attention_bias"),
    "mamba2": ("expand", "num_heads", "head_dim", "n_groups", "conv_kernel", "use_conv_bias"),
    "falcon_h1": ("mamba_d_ssm", "mamba_n_heads", "mamba_d_head", "mamba_rms_norm"),
    "bert": ("type_vocab_size", "layer_norm_eps", "hidden_act", "num_attention_heads"),
    "gemma3_text": ("query_pre_attn_scalar", "layer_types", "hidden_activation"),
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "qwen2_moe": (
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("shared_expert_intermediate_size", "decoder_sparse_step"),
    ),
    "qwen3_moe": ("num_experts", "num_experts_per_tok", "norm_topk_prob"),
    "deepseek_v2": (
        *("topk_method", "n_group", "topk_group", "routed_scaling_factor", "n_shared_experts"),
        *("first_k_dense_replace", "kv_lora_rank", "q_lora_rank", "v_head_dim"),
    ),
    "deepseek_v2-lite": ("topk_method", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    "deepseek_v3": ("norm_topk_prob", "n_group", "topk_group", "n_routed_experts"),
    "gpt_oss": ("num_local_experts", "num_experts_per_tok", "swiglu_limit", "layer_types"),
}
"""Fields that no method of a model's file shows."""


@pytest.mark.parametrize("name", FIELDS)
def test_other_fields_are_the_original_ones(name: str, originals: Callable[[str], Path]) -> None:
    directory = originals(name)
    original = read_json(directory / "config.json")
    found = GGUFCheckpoint(directory / "model.gguf").config
    assert {f: found[f] for f in FIELDS[name]} == {f: original[f] for f in FIELDS[name]}


@pytest.mark.parametrize("name", ["deepseek_v2-lite", "deepseek_v3"])
def test_scores_of_latent_attention(name: str, originals: Callable[[str], Path]) -> None:
    """YaRN's factor weighs them."""
    directory = originals(name)
    original = read_json(directory / "config.json")
    model: Any = find_architecture(original)
    found = model.latent_shape(GGUFCheckpoint(directory / "model.gguf").config)
    assert found == model.latent_shape(original)


def test_gemma3_has_frequencies_of_its_own_in_windows(originals: Callable[[str], Path]) -> None:
    config = GGUFCheckpoint(originals("gemma3_text") / "model.gguf").config
    assert config["rope_local_base_freq"] == 100.0 and config["rope_theta"] == 3000.0


def test_neox_turns_the_same_share(originals: Callable[[str], Path]) -> None:
    for name, share in (("gpt_neox", 0.25), ("gpt_neox-sequential", 0.5)):
        config = GGUFCheckpoint(originals(name) / "model.gguf").config
        assert config["rotary_pct"] == config["partial_rotary_factor"] == share
        assert config["rope_theta"] == 500.0


# -- files that differ from the converter's of today ------------------------------------------


@pytest.fixture
def llama(originals: Callable[[str], Path]) -> tuple[dict[str, Any], list[RawTensor]]:
    """Metadata and tensors of a Llama, to be altered."""
    directory = originals("llama")
    return convert_tensors(
        read_json(directory / "config.json"), load_file(directory / "model.safetensors")
    )


Llama = tuple[dict[str, Any], list[RawTensor]]


def reopened(llama: Llama, path: Path, **metadata: Any) -> GGUFCheckpoint:
    """The file with other metadata; ``None`` leaves a value out. Dots are written as "__"."""
    changed = {**llama[0], **{key.replace("__", "."): value for key, value in metadata.items()}}
    kept = {key: value for key, value in changed.items() if value is not None}
    return GGUFCheckpoint(write_gguf(path / "other.gguf", kept, llama[1]))


def test_unknown_architecture_lists_the_known(llama: Llama, tmp_path: Path) -> None:
    for name in ("rwkv7", 5, None, ["llama"]):
        message = refusal(lambda name=name: reopened(llama, tmp_path, general__architecture=name))
        assert repr(name) in message and all(known in message for known in ARCHITECTURES)


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_metadata_are_named(key: str, llama: Llama, tmp_path: Path) -> None:
    message = refusal(lambda: reopened(llama, tmp_path, **{key: None}))
    assert key in message and "lack" in message and "other.gguf" in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"llama.block_count": "2"}, ["llama.block_count", "'2'"]),
        ({"llama.block_count": 0}, ["llama.block_count", "0"]),
        ({"llama.block_count": 4_000_000_000}, ["4000000000 layers"]),
        ({"llama.attention.head_count": np.array([4, 2], np.int32)}, ["differs between layers"]),
        ({"llama.attention.head_count": 5}, ["attn_q.weight", "multiple of 10"]),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ["rms_epsilon", "nan"]),
        ({"llama.rope.scaling.type": "ntk"}, ["rope.scaling.type", "'ntk'", "yarn"]),
        ({"llama.rope.scaling.type": "yarn"}, ["llama.rope.scaling.factor"]),
        ({"llama.rope.scaling.type": "longrope"}, ["rope_factors_long.weight"]),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, ["dimension_count"]),
        ({"tokenizer.ggml.eos_token_id": "2"}, ["tokenizer.ggml.eos_token_id"]),
    ],
)
def test_impossible_metadata(
    changed: dict[str, Any], words: list[str], llama: Llama, tmp_path: Path
) -> None:
    message = refusal(lambda: reopened(llama, tmp_path, **changed))
    assert all(word in message for word in ["other.gguf", *words]), message


def test_values_for_each_layer_count_as_one(llama: Llama, tmp_path: Path) -> None:
    each = {"llama.attention.head_count": np.array([4, 4], np.int32)}
    assert reopened(llama, tmp_path, **each).config["num_attention_heads"] == 4


def test_a_tensor_that_the_architecture_does_not_have(llama: Llama, tmp_path: Path) -> None:
    for name in ("blk.0.attn_q.scale", "blk.0.attn_sinks.weight", "other.weight"):
        added = (llama[0], [*llama[1], numbers(name, 4)])
        assert repr(name) in refusal(lambda added=added: reopened(added, tmp_path))


def test_a_missing_tensor(llama: Llama, tmp_path: Path) -> None:
    fewer = [tensor for tensor in llama[1] if tensor.name != "blk.1.ffn_up.weight"]
    checkpoint = reopened((llama[0], fewer), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    assert name not in checkpoint
    for read in (checkpoint.read, checkpoint.view):
        message = refusal(lambda read=read: read(name, (112, 64)))
        assert repr(name) in message and "missing" in message
    assert "missing" in refusal(lambda: checkpoint.stored_rows(name))
    assert "token_embd" in refusal(lambda: reopened((llama[0], llama[1][:0]), tmp_path))


def test_another_shape(llama: Llama, tmp_path: Path) -> None:
    checkpoint = reopened(llama, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    message = refusal(lambda: checkpoint.read(name, (64, 112)))
    assert all(word in message for word in (repr(name), "[112, 64]", "[64, 112]"))
    assert "more than 112" in refusal(lambda: checkpoint.read(name, (64,), 112))


def test_special_tokens(llama: Llama, tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    config = reopened(llama, tmp_path, **tokens).config
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    turns = {**tokens, "tokenizer.ggml.eot_token_id": 7}
    assert reopened(llama, tmp_path, **turns).config["eos_token_id"] == [2, 7]


def test_a_window_makes_it_mistral(llama: Llama, tmp_path: Path) -> None:
    config = reopened(llama, tmp_path, **{"llama.attention.sliding_window": WINDOW}).config
    model: Any = find_architecture(config)
    assert config["model_type"] == "mistral" and model.parse(config).windows == (WINDOW,) * 2


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_factor_alone_is_linear(key: str, llama: Llama, tmp_path: Path) -> None:
    config = reopened(llama, tmp_path, **{key: 4.0}).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert "rope_scaling" not in reopened(llama, tmp_path, **{key: 1.0}).config


def test_llama3_frequencies_come_from_the_file(originals: Callable[[str], Path]) -> None:
    directory = originals("llama-biases")
    divisors = llama3_divisors(read_json(directory / "config.json"))
    assert len(set(divisors.tolist())) > 2
    scaling = GGUFCheckpoint(directory / "model.gguf").config["rope_scaling"]
    assert scaling["long_factor"] == scaling["short_factor"] == divisors.tolist()


def test_older_latent_attention(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """What makes keys and values was not cut once."""
    directory = originals("deepseek_v2")
    config = read_json(directory / "config.json")
    metadata, tensors = convert_tensors(config, load_file(directory / "model.safetensors"))
    original = stored_tensors(directory)
    whole = [
        encoded(f"blk.{layer}.attn_kv_b.weight", original[f"{prefix}kv_b_proj.weight"])
        for layer, prefix in ((n, f"model.layers.{n}.self_attn.") for n in range(2))
    ]
    kept = [t for t in tensors if "attn_k_b" not in t.name and "attn_v_b" not in t.name]
    for key in ("key_length", "value_length"):
        mla = metadata.pop(f"deepseek2.attention.{key}_mla")
        metadata[f"deepseek2.attention.{key}"] = mla
    path = write_gguf(tmp_path / "old.gguf", metadata, [*kept, *whole])
    old, new = GGUFCheckpoint(path), GGUFCheckpoint(directory / "model.gguf")
    assert old.config == new.config and set(old) == set(new)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    shape = tuple(original[name].shape)
    assert torch.equal(old.read(name, shape), new.read(name, shape))


def test_a_row_of_dimension_one_comes_and_goes(originals: Callable[[str], Path]) -> None:
    """Tools that write files anew leave out dimensions of 1."""
    checkpoint = GGUFCheckpoint(originals("qwen2_moe") / "model.gguf")
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    assert torch.equal(checkpoint.read(name, (64,)), checkpoint.read(name, (1, 64))[0])


def converted(
    directory: Path, path: Path, change: Mapping[str, Any], **metadata: Any
) -> GGUFCheckpoint:
    """A checkpoint with another ``config.json``, and other metadata, as GGUF."""
    config = {**read_json(directory / "config.json"), **change}
    found, tensors = convert_tensors(config, load_file(directory / "model.safetensors"))
    return reopened((found, tensors), path, **metadata)


def test_multipliers_are_in_the_weights(originals: Callable[[str], Path], tmp_path: Path) -> None:
    directory, multipliers = (
        originals("falcon_h1"),
        {
            "embedding_multiplier": 1.5,
            "attention_in_multiplier": 1.25,
            "key_multiplier": 0.5,
            "mlp_multipliers": [0.75, 2.0],
            "ssm_in_multiplier": 3.0,
            "ssm_multipliers": [1.0, 2.0, 4.0, 0.5, 0.25],
        },
    )
    checkpoint = converted(directory, tmp_path, multipliers)
    assert not [field for field in checkpoint.config if "multiplier" in field]
    rows = torch.tensor([1.0, 2.0, 4.0, 0.5, 0.25])
    rows = rows.repeat_interleave(torch.tensor([96, 96, 48, 48, 6]))
    original, layer = stored_tensors(directory), "model.layers.1."
    for name, factor in (
        ("model.embed_tokens.weight", 1.5),
        (layer + "self_attn.k_proj.weight", 1.25 * 0.5),
        (layer + "feed_forward.gate_proj.weight", 0.75),
        (layer + "feed_forward.down_proj.weight", 2.0),
        (layer + "feed_forward.up_proj.weight", 1.0),
        (layer + "mamba.in_proj.weight", 3.0 * rows.unsqueeze(1)),
    ):
        expected = original[name] * factor
        torch.testing.assert_close(checkpoint.read(name, tuple(expected.shape)), expected)


@pytest.mark.parametrize(
    ("metadata", "windows"),
    [
        ({}, [WINDOW, None, WINDOW]),
        ({"attention.sliding_window_pattern": 3}, [WINDOW, WINDOW, None]),
        ({"attention.sliding_window_pattern": 0}, [WINDOW] * 3),
        (
            {"attention.sliding_window_pattern": np.array([False, True, True])},
            [None, WINDOW, WINDOW],
        ),
        ({"attention.sliding_window": None}, [4096, None, 4096]),
        ({"attention.sliding_window": 0}, [None] * 3),
    ],
)
def test_windows(
    metadata: dict[str, Any],
    windows: list[int | None],
    originals: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    keys = {f"gemma2.{key}": value for key, value in metadata.items()}
    config = converted(originals("gemma2"), tmp_path, {}, **keys).config
    model: Any = find_architecture(config)
    assert model.parse(config).windows == tuple(windows)


def test_gemma3_without_windows(originals: Callable[[str], Path], tmp_path: Path) -> None:
    key = "gemma3.attention.sliding_window"
    config = converted(originals("gemma3_text"), tmp_path, {}, **{key: None}).config
    model: Any = find_architecture(config)
    assert model.parse(config).windows == (None,) * 7


def test_phi3_without_windows(originals: Callable[[str], Path], tmp_path: Path) -> None:
    config = converted(originals("phi3"), tmp_path, {"sliding_window": None}).config
    model: Any = find_architecture(config)
    assert model.parse(config).windows == (None,) * 2


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_scores_of_the_largest_gemma(
    name: str, layers: int, originals: Callable[[str], Path], tmp_path: Path
) -> None:
    """Told by its layers: scores are divided by the hidden state's share of a head."""
    key = f"{name.removesuffix('_text')}.block_count"
    directory = originals(name)
    config, tensors = convert_tensors(
        read_json(directory / "config.json"), load_file(directory / "model.safetensors")
    )
    more = [encoded(f"blk.{layer}.attn_norm.weight", torch.ones(64)) for layer in range(100, 162)]
    checkpoint = reopened((config, [*tensors, *more]), tmp_path, **{key: layers})
    assert checkpoint.config["query_pre_attn_scalar"] == 64 // 4


def test_heads_whose_width_only_rope_tells(llama: Llama, tmp_path: Path) -> None:
    assert "llama.attention.key_length" in llama[0]
    assert llama[0]["llama.rope.dimension_count"] == 16
    older = {"llama.attention.key_length": None, "llama.embedding_length": 128}
    assert reopened(llama, tmp_path, **older).config["head_dim"] == 16


@pytest.mark.parametrize(
    "metadata",
    [
        {"deepseek2.expert_gating_func": 3},
        {"deepseek2.expert_weights_norm": True},
    ],
)
def test_experts_that_are_chosen_in_other_ways(
    metadata: dict[str, Any], originals: Callable[[str], Path], tmp_path: Path
) -> None:
    message = refusal(lambda: converted(originals("deepseek_v2"), tmp_path, {}, **metadata))
    assert "expert_gating_func" in message and "other.gguf" in message


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("deepseek_v2", "blk.0.attn_v_b.weight", (4, 12, 16)),
        ("deepseek_v2", "blk.0.attn_k_b.weight", (128, 16)),
        ("gpt_oss", "blk.0.ffn_up_exps.weight", (6, 24, 64)),
        ("gpt_oss", "blk.0.ffn_down_exps.weight", (6 * 64, 48)),
        ("mixtral", "blk.0.ffn_up_exps.weight", (5 * 112, 64)),
        ("gpt2", "blk.0.ffn_up.weight", (256 * 64,)),
        ("gpt_neox", "blk.0.attn_qkv.weight", (190, 64)),
    ],
)
def test_tensors_that_cannot_be_put_together(
    name: str,
    tensor: str,
    shape: tuple[int, ...],
    originals: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    directory = originals(name)
    metadata, tensors = convert_tensors(
        read_json(directory / "config.json"), load_file(directory / "model.safetensors")
    )
    others = [one for one in tensors if one.name != tensor]
    assert len(others) == len(tensors) - 1
    message = refusal(lambda: reopened((metadata, [*others, numbers(tensor, *shape)]), tmp_path))
    assert tensor in message and "other.gguf" in message


def test_vectors_are_not_quantized(llama: Llama, tmp_path: Path) -> None:
    others = [tensor for tensor in llama[1] if tensor.name != "output_norm.weight"]
    quantized = encoded("output_norm.weight", torch.ones(64), "Q8_0")
    checkpoint = reopened((llama[0], [*others, quantized]), tmp_path)
    message = refusal(lambda: checkpoint.read("model.norm.weight", (64,)))
    assert "output_norm.weight" in message and "Q8_0" in message
