"""Integers of other programs in the native layout: kept to the bit, and multiplied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.contracts.load_map import LoadMap
from headrace.errors import CheckpointError
from headrace.models.base import find_architecture
from headrace.ops.block_weight import unpack_blocks
from headrace.ops.device import resolve_device
from headrace.ops.linear import Linear
from headrace.ops.table import make_ops
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.counting import WeightCounter
from headrace.weights.formats import WeightPlan
from headrace.weights.gguf.block_types import BLOCK_TYPES, BlockType
from headrace.weights.gguf.checkpoint import GGUFCheckpoint
from headrace.weights.loader import WeightLoader
from headrace.weights.reader import Stack, WeightReader
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint
from headrace.weights.stored_blocks import pack_stored
from tests.support.gguf_files import RawTensor, encoded, random_blocks, write_gguf
from tests.support.quantized_weights import Weight, pack_gptq, pack_mxfp4

QUANTIZED = [type for type in BLOCK_TYPES if type.layout is not None]
WIDTH = 256
"""Of the hidden state: one block of the types with the largest."""
KINDS = ("q", "k", "v")


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda type: type.name)
def test_parts_stand_for_the_same_values(type: BlockType) -> None:
    rows = random_blocks(type, 12, 2 * WIDTH)
    assert type.layout is not None
    parts = type.parts(rows)
    found, expected = parts.dequantize(type.layout), torch.from_numpy(type.dequantize(rows))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert type.bits_per_weight == parts.bits_per_weight(type.layout)


def make_file(path: Path, types: dict[str, str], rows: int = 64, hidden: int = WIDTH) -> Path:
    """A Llama of one layer whose attention has weights of these types; other matrices are F16."""
    torch.manual_seed(len(types))
    half = hidden // 2

    def tensor(name: str, *shape: int) -> RawTensor:
        kind = types.get(name.removeprefix("blk.0.").removesuffix(".weight"))
        kind = kind or ("F32" if len(shape) == 1 else "F16")
        return encoded(name, torch.randn(shape) / hidden**0.5, kind)

    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": half,
        "llama.attention.head_count": rows // 16,
        "llama.attention.head_count_kv": rows // 16,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 48,
    }
    shapes = {
        **{f"blk.0.attn_{kind}.weight": (rows, hidden) for kind in KINDS},
        "blk.0.attn_output.weight": (hidden, rows),
        "blk.0.ffn_gate.weight": (half, hidden),
        "blk.0.ffn_up.weight": (half, hidden),
        "blk.0.ffn_down.weight": (hidden, half),
        "token_embd.weight": (48, hidden),
        "output.weight": (48, hidden),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "output_norm.weight": (hidden,),
    }
    return write_gguf(path, metadata, [tensor(name, *shape) for name, shape in shapes.items()])


QKV = [f"model.layers.0.self_attn.{kind}_proj" for kind in KINDS]
GATE_UP = [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up")]


def dense(checkpoint: Checkpoint, names: list[str], rows: int, columns: int) -> Tensor:
    """The weights one above the other, in fp32."""
    parts = [checkpoint.read(f"{name}.weight", (rows, columns)).float() for name in names]
    return torch.cat(parts)


def loader(checkpoint: Checkpoint, dtype: str = "bfloat16", **options: Any) -> WeightLoader:
    ops = make_ops(resolve_device("cpu"), dtype, threads=1)
    return WeightLoader(checkpoint, LoadMap(), ops, **options)


def check_product(linear: Linear, weight: Tensor, gated: bool = False) -> None:
    """Activations are rounded to 8 bits: about a hundredth of a typical result."""
    torch.manual_seed(3)
    x = torch.randn(5, weight.shape[1]).bfloat16()
    expected = x.float() @ weight.T
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    error = linear(x, out_dtype=torch.float32) - expected
    assert float(error.pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()) < 0.02


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_one_type_is_one_product(type: str, tmp_path: Path) -> None:
    path = make_file(tmp_path / "a.gguf", {f"attn_{kind}": type for kind in KINDS})
    checkpoint = GGUFCheckpoint(path)
    source = loader(checkpoint)
    linear = source.linear(QKV, [64] * 3, WIDTH)
    assert dict(source.kept) == {type: 3 * 64 * WIDTH}
    weight = dense(checkpoint, QKV, 64, WIDTH)
    check_product(linear, weight)
    blocks = [checkpoint.blocks(f"{name}.weight") for name in QKV]
    packed = pack_stored([one for one in blocks if one is not None])
    assert torch.equal(unpack_blocks(packed).dequantize(packed.layout), weight)
    stored = sum(one.num_bytes for one in blocks if one is not None)
    assert packed.num_bytes == stored == source.num_bytes


def test_rows_in_another_order_stay_one_product(tmp_path: Path) -> None:
    path = make_file(tmp_path / "a.gguf", {"ffn_gate": "Q4_0", "ffn_up": "Q4_0"})
    checkpoint = GGUFCheckpoint(path)
    weight, order = dense(checkpoint, GATE_UP, 128, WIDTH), torch.randperm(256)
    source = loader(checkpoint)
    linear = source.linear(GATE_UP, [128, 128], WIDTH, gated=True, order=order.tolist())
    assert dict(source.kept) == {"Q4_0": 256 * WIDTH}
    check_product(linear, weight[order], gated=True)


@pytest.mark.parametrize("gated", [False, True])
def test_several_types_are_several_products(gated: bool, tmp_path: Path) -> None:
    types = {"ffn_gate": "Q4_0", "ffn_up": "Q8_0", "attn_q": "Q5_1", "attn_k": "Q5_1"}
    checkpoint = GGUFCheckpoint(make_file(tmp_path / "a.gguf", types))
    source = loader(checkpoint)
    if gated:
        linear = source.linear(GATE_UP, [128, 128], WIDTH, gated=True)
        check_product(linear, dense(checkpoint, GATE_UP, 128, WIDTH), gated=True)
        assert dict(source.kept) == {"Q4_0": 128 * WIDTH, "Q8_0": 128 * WIDTH}
    else:
        linear = source.linear(QKV, [64] * 3, WIDTH)
        check_product(linear, dense(checkpoint, QKV, 64, WIDTH))
        assert dict(source.kept) == {"Q5_1": 2 * 64 * WIDTH}


def test_rows_of_several_types_in_another_order_are_numbers(tmp_path: Path) -> None:
    types = {"ffn_gate": "Q4_0", "ffn_up": "Q8_0"}
    checkpoint = GGUFCheckpoint(make_file(tmp_path / "a.gguf", types))
    order = torch.randperm(256)
    source = loader(checkpoint)
    linear = source.linear(GATE_UP, [128, 128], WIDTH, order=order.tolist())
    assert not source.kept
    check_product(linear, dense(checkpoint, GATE_UP, 128, WIDTH)[order])


def test_tables_stay_quantized(tmp_path: Path) -> None:
    types = {"token_embd": "Q4_0", "output": "Q8_0"}
    checkpoint = GGUFCheckpoint(make_file(tmp_path / "a.gguf", types))
    source, ids = loader(checkpoint), torch.tensor([3, 47, 0, 3])
    rows = source.embedding("model.embed_tokens", 48, WIDTH)(ids)
    expected = checkpoint.read("model.embed_tokens.weight", (48, WIDTH))
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), expected[ids], rtol=2**-8, atol=0)
    head = source.head("lm_head", 48, WIDTH)
    assert source.head_kept == "Q8_0"
    check_product(head, checkpoint.read("lm_head.weight", (48, WIDTH)))
    torch.testing.assert_close(
        head.rows(ids).float(),
        checkpoint.read("lm_head.weight", (48, WIDTH))[ids],
        rtol=2**-8,
        atol=0,
    )


def test_other_formats_and_fp32_are_made_of_the_values(tmp_path: Path) -> None:
    path = make_file(tmp_path / "a.gguf", {f"attn_{kind}": "Q4_0" for kind in KINDS})
    checkpoint = GGUFCheckpoint(path)
    weight = dense(checkpoint, QKV, 64, WIDTH)
    exact = loader(checkpoint, "float32")
    x = torch.randn(5, WIDTH)
    found = exact.linear(QKV, [64] * 3, WIDTH)(x)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-5, atol=1e-5)
    again = loader(checkpoint, plan=WeightPlan.parse("w8a8"))
    check_product(again.linear(QKV, [64] * 3, WIDTH), weight)
    assert not exact.kept and not again.kept


def write_safetensors(
    directory: Path, section: dict[str, Any], tensors: dict[str, Tensor]
) -> SafetensorsCheckpoint:
    config = {"model_type": "llama", "quantization_config": section}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return SafetensorsCheckpoint(directory)


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [32, 128, 512])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, group: int, symmetric: bool, shuffled: bool, tmp_path: Path) -> None:
    """A group of 512 is the whole row, which no group of the native layout covers alone."""
    weight = Weight(32, 512, group, bits, symmetric, shuffled, lowest_zero=1, size=0.01)
    section = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled}
    checkpoint = write_safetensors(tmp_path, section, pack_gptq(weight, less=1))
    source = loader(checkpoint)
    linear = source.linear(["model.layers.0.mlp.up_proj"], [32], 512)
    assert source.kept.total() == 32 * 512
    check_product(linear, weight.dense())


def test_zeros_of_one_weight_are_enough(tmp_path: Path) -> None:
    """GPTQ says by its values whether a weight has zero points; a product takes both kinds."""
    weights = [
        Weight(32, 128, 32, 4, symmetric, lowest_zero=1, size=0.01) for symmetric in (True, False)
    ]
    tensors: dict[str, Tensor] = {}
    for name, weight in zip(GATE_UP, weights, strict=True):
        packed = pack_gptq(weight, less=1)
        tensors |= {f"{name}.{key.rpartition('.')[2]}": value for key, value in packed.items()}
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    checkpoint = write_safetensors(tmp_path, section, tensors)
    linear = loader(checkpoint).linear(GATE_UP, [32, 32], 128, gated=True)
    check_product(linear, torch.cat([weight.dense() for weight in weights]), gated=True)


@pytest.mark.parametrize("in_turn", [False, True])
def test_experts_of_gpt_oss(in_turn: bool, tmp_path: Path) -> None:
    """They lie in one tensor, whose unquantized form has rows as columns."""
    tensors, whole = pack_mxfp4(3, 32, 4, range(118, 124))
    section = {"quant_method": "mxfp4"}
    checkpoint = write_safetensors(tmp_path, section, tensors)
    ops = make_ops(resolve_device("cpu"), "bfloat16", threads=1)
    source = WeightLoader(checkpoint, find_architecture({"model_type": "gpt_oss"}).load_map, ops)
    order = [*range(0, 32, 2), *range(1, 32, 2)] if in_turn else None
    for expert in range(3):
        name = f"model.layers.0.mlp.experts.{expert}.gate_up_proj"
        linear = source.linear([name], [32], 128, order=order)
        weight = whole[expert]
        check_product(linear, weight if order is None else weight[order])
    assert dict(source.kept) == {"MXFP4": 3 * 32 * 128}


def test_counting_agrees_with_loading(tmp_path: Path) -> None:
    types = {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q8_0", "token_embd": "Q5_1"}
    checkpoint = GGUFCheckpoint(make_file(tmp_path / "a.gguf", types))
    source = loader(checkpoint)
    ops = make_ops(resolve_device("cpu"), "bfloat16", threads=1)
    counter = WeightCounter(
        WeightReader(checkpoint, LoadMap()), WeightPlan(), ops.linears, torch.bfloat16
    )
    for each in (source, counter):
        each.embedding("model.embed_tokens", 48, WIDTH)
        each.linear(QKV, [64] * 3, WIDTH)
        each.linear(GATE_UP, [128, 128], WIDTH, gated=True)
        each.head("lm_head", 48, WIDTH)
    assert counter.num_bytes == source.num_bytes
    assert counter.num_parameters == source.num_parameters
    stored = {kind: count for (kind, kept), count in counter.kept.items() if kept != "bfloat16"}
    assert stored == dict(source.kept)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(make_file(tmp_path / "a.gguf", {"attn_q": "Q4_0"}))
    reader = WeightReader(checkpoint, LoadMap())
    assert reader.blocks(Stack(QKV[:1], [64], WIDTH)) != [None]
    assert reader.blocks(Stack(QKV[:1], [32], WIDTH)) == [None]
    with pytest.raises(CheckpointError, match="do not belong together"):
        loader(checkpoint).linear(QKV[:1], [32], WIDTH)
