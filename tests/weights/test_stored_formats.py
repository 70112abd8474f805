"""Weights that checkpoints hold quantized: what is read is what was packed, value by value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig
from headrace.errors import CheckpointError
from headrace.loading import quantize_model
from headrace.models.gpt_oss import Model as GptOss
from headrace.weights.formats import WeightPlan
from headrace.weights.reader import WeightReader
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint
from headrace.weights.stored_formats import STORED_FORMATS
from tests.support.checkpoints import copy_checkpoint, edit_config, edit_tensors, make_checkpoint
from tests.support.logits import LogitsRecorder
from tests.support.quantized_weights import (
    E4M3,
    E5M2,
    EXPERTS,
    MODULE,
    WEIGHT,
    Tensors,
    Weight,
    float8,
    int8,
    int32,
    number,
    pack_awq,
    pack_compressed,
    pack_gptq,
    pack_mxfp4,
    scaled,
    turned,
    word_of,
    words_of,
)

Section = dict[str, Any]


def write(directory: Path, section: Section | None, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "torch_dtype": "float16", **config}
    if section is not None:
        config["quantization_config"] = section
    (directory / "config.json").write_text(json.dumps(config))
    plain = {"model.norm.weight": torch.ones(8)}
    save_file({**plain, **tensors}, directory / "model.safetensors", {"format": "pt"})
    return directory


def awq(group: int = 32, **changed: Any) -> Section:
    section = {"bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return {"quant_method": "awq", "modules_to_not_convert": None, **section, **changed}


def gptq(bits: int = 4, group: int = 32, **changed: Any) -> Section:
    section = {"bits": bits, "group_size": group, "desc_act": False, "sym": True}
    return {"quant_method": "gptq", **section, **changed}


def compressed(
    layout: str = "pack-quantized", changed: Section | None = None, **weights: Any
) -> Section:
    """Args: changed: of the section; weights: of its group's arguments for weights."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    if layout == "pack-quantized":
        defaults |= {"num_bits": 4, "strategy": "group", "group_size": 32}
    if layout == "float-quantized":
        defaults |= {"type": "float"}
    group = {"targets": ["Linear"], "weights": {**defaults, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        **(changed or {}),
    }


def fp8(**changed: Any) -> Section:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [8, 16],
        **changed,
    }


def refusal(section: Section | None, tensors: Tensors, directory: Path, name: str = WEIGHT) -> str:
    """The message with which a weight, or the whole checkpoint, is refused."""
    shape, index = ((32, 2), 1) if name == EXPERTS else ((16, 64), None)
    write(directory, section, tensors)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsCheckpoint(directory).read(name, shape, index)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_integers(checkpoint: SafetensorsCheckpoint, weight: Weight) -> None:
    """What is read, dense and as integers, is what was packed."""
    shape = weight.rows, weight.columns
    assert WEIGHT in checkpoint and set(checkpoint) == {WEIGHT, "model.norm.weight"}
    dense = checkpoint.read(WEIGHT, shape)
    assert dense.dtype == torch.float32 and torch.equal(dense, weight.dense())
    assert checkpoint.blocks("model.norm.weight") is None
    blocks = checkpoint.blocks(WEIGHT)
    assert (blocks is None) == (weight.scales.dtype == torch.float32 or weight.group % 32 != 0)
    if blocks is None:
        return
    layout, parts = blocks.layout, blocks.open()(torch.arange(weight.rows))
    assert (layout.bits, layout.group * layout.super) == (weight.bits, weight.group)
    assert torch.equal(parts.factors, weight.scales)
    assert (blocks.order is not None) == weight.shuffled
    columns = list(range(weight.columns)) if blocks.order is None else blocks.order.tolist()
    assert sorted(columns) == list(range(weight.columns))
    for place, column in enumerate(columns):
        assert weight.groups[column] == place // weight.group
    in_order = torch.empty_like(dense)
    in_order[:, columns] = parts.dequantize(layout)
    assert torch.equal(in_order, dense)


# -- AWQ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq(group: int, tmp_path: Path) -> None:
    weight = Weight(16, 256, 256 if group == -1 else group)
    check_integers(SafetensorsCheckpoint(write(tmp_path, awq(group), pack_awq(weight))), weight)


def test_modules_that_awq_leaves_are_read_as_they_are(tmp_path: Path) -> None:
    gate = torch.randn(4, 64).half()
    tensors = {**pack_awq(Weight(16, 64, 32)), "model.layers.0.mlp.gate.weight": gate}
    section = awq(modules_to_not_convert=["mlp.gate"])
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, tensors))
    assert torch.equal(checkpoint.read("model.layers.0.mlp.gate.weight", (4, 64)), gate)
    assert checkpoint.blocks("model.layers.0.mlp.gate.weight") is None


# -- GPTQ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("layout", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(
    bits: int, layout: str | None, symmetric: bool, shuffled: bool, tmp_path: Path
) -> None:
    weight = Weight(16, 96, 32, bits, symmetric, shuffled, lowest_zero=1)
    section = gptq(bits, sym=symmetric, desc_act=shuffled, checkpoint_format=layout)
    tensors = pack_gptq(weight, less=0 if layout == "gptq_v2" else 1)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, tensors))
    check_integers(checkpoint, weight)
    blocks = checkpoint.blocks(WEIGHT)
    assert blocks is not None
    assert (blocks.open()(torch.arange(16)).zeros is None) == symmetric


@pytest.mark.parametrize("group", [-1, 64])
def test_gptq_groups(group: int, tmp_path: Path) -> None:
    """One for all of a row; and a last one that is cut off."""
    weight = Weight(16, 96, 96 if group == -1 else group, lowest_zero=1)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, gptq(4, group), pack_gptq(weight, 1)))
    check_integers(checkpoint, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points_of_nought_borrow(bits: int, tmp_path: Path) -> None:
    """GPTQModel subtracts from whole words."""
    weight = Weight(16, 64, 8, bits)
    for row in (0, 2, 3, 7, 11, 15):
        weight.zeros[row][row % 8] = weight.zeros[row][5] = 0
    ones = word_of([1] * (32 // bits), bits)
    words = [[word - ones for word in words_of(line, bits)] for line in turned(weight.zeros)]
    tensors = {**pack_gptq(weight, 0), f"{MODULE}.qzeros": int32(words)}
    section = gptq(bits, 8, checkpoint_format="gptq")
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, tensors)), weight)


def test_gptq_needs_no_order_where_columns_are_in_theirs(tmp_path: Path) -> None:
    weight = Weight(16, 64, 32, lowest_zero=1)
    tensors = pack_gptq(weight, 1)
    del tensors[f"{MODULE}.g_idx"]
    check_integers(SafetensorsCheckpoint(write(tmp_path / "a", gptq(), tensors)), weight)
    message = refusal(gptq(desc_act=True), tensors, tmp_path / "b")
    assert repr(f"{MODULE}.g_idx") in message and "missing" in message


@pytest.mark.parametrize("groups", [[0] * 64, [0] * 31 + [1] * 33, [0] * 32 + [2] * 32])
def test_gptq_groups_of_other_sizes(groups: list[int], tmp_path: Path) -> None:
    tensors = pack_gptq(Weight(16, 64, 32), 0)
    tensors[f"{MODULE}.g_idx"] = torch.tensor(groups, dtype=torch.int32)
    message = refusal(gptq(), tensors, tmp_path)
    assert repr(f"{MODULE}.g_idx") in message and "2 groups of 32" in message


def test_gptq_modules_that_are_left_out(tmp_path: Path) -> None:
    weight = Weight(16, 64, 32, lowest_zero=1)
    section = gptq(dynamic={"-:.*down_proj": {}})
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, pack_gptq(weight, 1))), weight)


# -- compressed-tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "actorder"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (13, 96)])
def test_pack_quantized(
    rows: int, columns: int, bits: int, symmetric: bool, shuffled: bool, tmp_path: Path
) -> None:
    weight = Weight(rows, columns, 32, bits, symmetric, shuffled)
    order = "group" if shuffled else None
    section = compressed(num_bits=bits, symmetric=symmetric, actorder=order)
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, pack_compressed(weight))), weight)


def test_pack_quantized_by_channel(tmp_path: Path) -> None:
    """The last word of a row is not full."""
    weight = Weight(16, 60, 60)
    section = compressed(symmetric=False, strategy=None, group_size=-1)
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, pack_compressed(weight))), weight)


@pytest.mark.parametrize("actorder", [None, "weight", "static", False])
def test_columns_are_in_order_unless_groups_are_not(actorder: Any, tmp_path: Path) -> None:
    weight = Weight(16, 64, 32, symmetric=True)
    section = compressed(actorder=actorder)
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, pack_compressed(weight))), weight)


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_an_order_that_is_promised_must_be_there(actorder: Any, tmp_path: Path) -> None:
    message = refusal(
        compressed(actorder=actorder), pack_compressed(Weight(16, 64, 32, symmetric=True)), tmp_path
    )
    assert repr(f"{WEIGHT}_g_idx") in message and "missing" in message


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor"])
def test_int_quantized(strategy: str, symmetric: bool, tmp_path: Path) -> None:
    weight = Weight(16, 64, 32 if strategy == "group" else 64, 8, symmetric)
    if strategy == "tensor":
        weight.scales = weight.scales[:1].expand(16, 1)
        weight.zeros = [weight.zeros[0]] * 16
    stored = slice(1) if strategy == "tensor" else slice(None)
    tensors = {
        WEIGHT: int8(weight.values),
        f"{WEIGHT}_scale": weight.scales[stored].contiguous(),
        f"{MODULE}.input_scale": torch.ones(1),
    }
    if strategy == "tensor":
        tensors[f"{WEIGHT}_scale"] = tensors[f"{WEIGHT}_scale"].view(1)
    if not symmetric:
        tensors[f"{WEIGHT}_zero_point"] = int8(weight.zeros)[stored].contiguous()
    size: Section = {"group_size": 32} if strategy == "group" else {}
    section = compressed("int-quantized", strategy=strategy, symmetric=symmetric, **size)
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, tensors)), weight)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_quantized(strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rows, columns = 20, 40
    block = {"tensor": (rows, columns), "channel": (1, columns), "block": (8, 16)}[strategy]
    weight, values = float8(rows, columns)
    grid = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    scales = (torch.rand(grid) + 0.5).to(dtype)
    tensors = {WEIGHT: weight, f"{WEIGHT}_scale": scales.view(1) if grid == (1, 1) else scales}
    structure: Section = {"block_structure": [8, 16]} if strategy == "block" else {}
    section = compressed("float-quantized", strategy=strategy, **structure)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, tensors))
    found = checkpoint.read(WEIGHT, (rows, columns))
    assert found.dtype == torch.float32 and torch.equal(found, scaled(values, scales, block))
    assert checkpoint.blocks(WEIGHT) is None and set(checkpoint) == {WEIGHT, "model.norm.weight"}


@pytest.mark.parametrize(
    "ignored", [MODULE, "re:.*up_proj", "re:model[.]layers[.]0[.].*", "re:.*(gate|up)_proj$"]
)
def test_ignored_modules_are_plain(ignored: str, tmp_path: Path) -> None:
    plain = torch.randn(16, 64).bfloat16()
    section = compressed(changed={"ignore": ["lm_head", ignored]})
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, {WEIGHT: plain}))
    assert torch.equal(checkpoint.read(WEIGHT, (16, 64)), plain)
    weight, values = float8(16, 64)
    section = compressed("float-quantized", changed={"ignore": [ignored]})
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, {WEIGHT: weight}))
    assert checkpoint.read(WEIGHT, (16, 64)).tolist() == values


def test_a_pattern_begins_where_a_name_does(tmp_path: Path) -> None:
    weight = Weight(16, 64, 32, symmetric=True)
    section = compressed(changed={"ignore": ["re:up_proj", "up_proj", f"{MODULE}s"]})
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, pack_compressed(weight))), weight)


def group_of(targets: list[str], layout: str, **weights: Any) -> Section:
    (group,) = compressed(layout, **weights)["config_groups"].values()
    return {**group, "targets": targets, "format": layout}


@pytest.mark.parametrize("targets", [[MODULE], ["re:.*up_proj"], ["re:.*gate", "re:.*up_"]])
@pytest.mark.parametrize("first", [False, True])
def test_names_and_patterns_come_before_classes(
    targets: list[str], first: bool, tmp_path: Path
) -> None:
    groups = {"a": group_of(["Linear"], "float-quantized")}
    ours = {"b": group_of(targets, "pack-quantized", symmetric=False)}
    groups = {**ours, **groups} if first else {**groups, **ours}
    section = compressed("mixed-precision", changed={"config_groups": groups})
    weight = Weight(16, 64, 32)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, pack_compressed(weight)))
    check_integers(checkpoint, weight)


def test_names_come_before_patterns(tmp_path: Path) -> None:
    groups = {
        "a": group_of(["re:.*up_proj"], "pack-quantized", group_size=16),
        "b": group_of([MODULE], "pack-quantized", group_size=32),
    }
    section = compressed(changed={"config_groups": groups})
    weight = Weight(16, 64, 32, symmetric=True)
    check_integers(SafetensorsCheckpoint(write(tmp_path, section, pack_compressed(weight))), weight)


def test_a_module_of_no_group(tmp_path: Path) -> None:
    groups = {"a": group_of(["re:.*down_proj"], "pack-quantized")}
    section = compressed(changed={"config_groups": groups})
    message = refusal(section, pack_compressed(Weight(16, 64, 32, symmetric=True)), tmp_path)
    assert "config_groups" in message and MODULE in message


def test_a_module_in_another_layout_than_its_groups(tmp_path: Path) -> None:
    message = refusal(compressed("int-quantized"), pack_compressed(Weight(16, 64, 32)), tmp_path)
    assert repr(f"{WEIGHT}_packed") in message and "I8" in message


# -- small floating-point types ---------------------------------------------------------------


def test_fp8_blocks(tmp_path: Path) -> None:
    """The last ones are cut off."""
    weight, values = float8(20, 40)
    scales = torch.rand(3, 3) + 0.5
    tensors = {WEIGHT: weight, f"{WEIGHT}_scale_inv": scales}
    checkpoint = SafetensorsCheckpoint(write(tmp_path, fp8(), tensors))
    found = checkpoint.read(WEIGHT, (20, 40))
    assert found.dtype == torch.float32 and torch.equal(found, scaled(values, scales, (8, 16)))
    assert checkpoint.blocks(WEIGHT) is None and set(checkpoint) == {WEIGHT, "model.norm.weight"}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", ["scale", "scale_inv"])
def test_fp8_with_one_scale(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, values = float8(20, 40)
    scale = (torch.rand(shape) + 0.5).bfloat16()
    tensors = {
        WEIGHT: weight,
        f"{WEIGHT}_{kind}": scale,
        f"{MODULE}.input_scale": torch.ones(()),
    }
    checkpoint = SafetensorsCheckpoint(write(tmp_path, fp8(weight_block_size=None), tensors))
    expected = scaled(values, scale.view(1, 1), (20, 40))
    assert torch.equal(checkpoint.read(WEIGHT, (20, 40)), expected)
    assert set(checkpoint) == {WEIGHT, "model.norm.weight"}


def test_fp8_is_what_torch_reads(tmp_path: Path) -> None:
    weight, _ = float8(16, 64)
    tensors = {WEIGHT: weight, f"{WEIGHT}_scale_inv": torch.full((2, 4), 0.5)}
    checkpoint = SafetensorsCheckpoint(write(tmp_path, fp8(), tensors))
    assert torch.equal(checkpoint.read(WEIGHT, (16, 64)), weight.float() / 2)


@pytest.mark.parametrize("section", [None, awq(), compressed()])
@pytest.mark.parametrize(
    ("dtype", "numbers", "exponent"),
    [(torch.float8_e4m3fn, E4M3, 4), (torch.float8_e5m2, E5M2, 5)],
)
def test_small_types_without_scales(
    dtype: torch.dtype,
    numbers: list[int],
    exponent: int,
    section: Section | None,
    tmp_path: Path,
) -> None:
    """Every number of the type."""
    stored = torch.tensor(numbers, dtype=torch.uint8).view(dtype).view(2, -1)
    name = "model.embed_tokens.scaled"
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, {name: stored}))
    found = checkpoint.read(name, tuple(stored.shape))
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), stored.float())
    expected = [number(byte, exponent, 7 - exponent) for byte in numbers]
    assert found.flatten().tolist() == expected
    assert torch.equal(checkpoint.read(name, (stored.shape[1],), 1), found[1])


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_that_nothing_explains(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {WEIGHT: torch.ones(16, 64).to(dtype), WEIGHT + suffix: torch.ones(1)}
    message = refusal(None, tensors, tmp_path)
    assert repr(WEIGHT) in message and "with scales" in message and "headrace quantize" in message


# -- MXFP4 ------------------------------------------------------------------------------------

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
}


def test_mxfp4(tmp_path: Path) -> None:
    tensors, dense = pack_mxfp4(3, 6, 2)
    checkpoint = SafetensorsCheckpoint(write(tmp_path, MXFP4, tensors))
    assert set(checkpoint) == {EXPERTS, "model.norm.weight"}
    assert torch.equal(checkpoint.read(EXPERTS, (3, 64, 6)), dense.transpose(1, 2))
    for expert in range(3):
        found = checkpoint.read(EXPERTS, (64, 6), expert)
        assert found.dtype == torch.float32 and torch.equal(found, dense[expert].t())
        assert torch.equal(found.bfloat16().float(), found)
    assert checkpoint.blocks(EXPERTS) is None


def test_mxfp4_is_what_transformers_reads(tmp_path: Path) -> None:
    tensors, _ = pack_mxfp4(2, 40, 3, range(2, 250))
    checkpoint = SafetensorsCheckpoint(write(tmp_path, MXFP4, tensors))
    expected = convert_moe_packed_tensors(*tensors.values(), dtype=torch.float32)
    assert torch.equal(checkpoint.read(EXPERTS, (2, 96, 40)), expected)


def test_mxfp4_scales_at_the_ends_of_their_range(tmp_path: Path) -> None:
    tensors, dense = pack_mxfp4(1, 2, 2, range(1))
    tensors[f"{EXPERTS}_scales"][0, 1, 0] = 255
    found = SafetensorsCheckpoint(write(tmp_path, MXFP4, tensors)).read(EXPERTS, (64, 2), 0).t()
    assert found[1, :32].isnan().all()
    assert torch.equal(found[0], dense[0, 0]) and torch.equal(found[1, 32:], dense[0, 1, 32:])


def test_experts_are_those_of_the_unquantized_checkpoint(tmp_path: Path) -> None:
    """By the names that the model asks for."""
    tensors, dense = pack_mxfp4(3, 6, 2)
    bias = torch.randn(3, 6).bfloat16()
    tensors[f"{EXPERTS}_bias"] = bias
    router = torch.randn(3, 64).bfloat16()
    tensors["model.layers.0.mlp.router.weight"] = router
    plain = {**tensors, EXPERTS: dense.transpose(1, 2).bfloat16().contiguous()}
    for kind in ("blocks", "scales"):
        del plain[f"{EXPERTS}_{kind}"]
    prefix = "model.layers.0.mlp.experts.2.gate_up_proj"
    for section, stored in ((MXFP4, tensors), (None, plain)):
        checkpoint = SafetensorsCheckpoint(write(tmp_path, section, stored))
        reader = WeightReader(checkpoint, GptOss.load_map)
        found = reader.read(f"{prefix}.weight", (6, 64))
        assert torch.equal(found.float(), dense[2]) and found.is_contiguous()
        assert torch.equal(reader.read(f"{prefix}.bias", (6,)), bias[2])
        assert torch.equal(reader.read("model.layers.0.mlp.router.weight", (3, 64)), router)
        assert f"{prefix}.weight" in reader


@pytest.mark.parametrize("shape", [(2, 2, 1, 8), (2, 2, 16), (2, 2, 2, 1, 16)])
def test_mxfp4_blocks_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors, _ = pack_mxfp4(2, 2, 1)
    tensors[f"{EXPERTS}_blocks"] = torch.zeros(shape, dtype=torch.uint8)
    message = refusal(MXFP4, tensors, tmp_path, EXPERTS)
    assert repr(f"{EXPERTS}_blocks") in message and "[experts, rows, groups, 16]" in message


# -- what does not fit ------------------------------------------------------------------------


def samples() -> dict[str, tuple[Section, Tensors]]:
    """A checkpoint of each format with a weight ``[16, 64]``, or two experts ``[32, 2]``."""
    weight, both = Weight(16, 64, 32), Weight(16, 64, 32, shuffled=True)
    small, column = float8(16, 64)[0], torch.ones(16, 1)
    points = torch.zeros(16, 1, dtype=torch.int8)
    grouped: Section = {"symmetric": False, "actorder": "group"}
    return {
        "awq": (awq(), pack_awq(weight)),
        "gptq": (gptq(desc_act=True), pack_gptq(both, 0)),
        "pack-quantized": (compressed(**grouped), pack_compressed(both)),
        "int-quantized": (
            compressed("int-quantized", symmetric=False),
            {
                WEIGHT: torch.ones(16, 64, dtype=torch.int8),
                f"{WEIGHT}_scale": column,
                f"{WEIGHT}_zero_point": points,
            },
        ),
        "float-quantized": (
            compressed("float-quantized"),
            {WEIGHT: small, f"{WEIGHT}_scale": column},
        ),
        "fp8": (fp8(), {WEIGHT: small, f"{WEIGHT}_scale_inv": torch.ones(2, 4)}),
        "fp8 with one scale": (
            fp8(weight_block_size=None),
            {WEIGHT: small, f"{WEIGHT}_scale": torch.ones(1)},
        ),
        "mxfp4": (MXFP4, pack_mxfp4(2, 2, 1)[0]),
    }


PARTS = [(kind, name) for kind, (_, tensors) in samples().items() for name in tensors]


@pytest.mark.parametrize("fault", ["missing", "short", "of another type"])
@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_tensors_that_do_not_fit(kind: str, part: str, fault: str, tmp_path: Path) -> None:
    section, tensors = samples()[kind]
    name = EXPERTS if kind == "mxfp4" else WEIGHT
    tensor = tensors.pop(part)
    if fault == "short":
        tensors[part] = tensor[:-1].clone()
    elif fault == "of another type":
        tensors[part] = tensor.double()
    message = refusal(section, tensors, tmp_path, name)
    if fault == "missing":
        # Without its values, nothing says that a weight was there.
        assert "is missing" in message and (repr(part) in message or repr(name) in message)
        values = ("qweight", "packed", "weight", "blocks")
        assert repr(part) in message or part.endswith(values)
    else:
        assert repr(part) in message
        assert ("do not belong together" if fault == "short" else "F64") in message


@pytest.mark.parametrize("kind", samples())
def test_samples_are_right_otherwise(kind: str, tmp_path: Path) -> None:
    section, tensors = samples()[kind]
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, tensors))
    name, shape = (EXPERTS, (2, 32, 2)) if kind == "mxfp4" else (WEIGHT, (16, 64))
    whole = checkpoint.read(name, shape)
    assert whole.shape == shape and torch.equal(checkpoint.read(name, shape[1:], 1), whole[1])


@pytest.mark.parametrize("kind", samples())
@pytest.mark.parametrize(
    ("shape", "index"), [((64, 16), None), ((16, 63), None), ((64,), None), ((32, 3), 0)]
)
def test_another_model(
    kind: str, shape: tuple[int, ...], index: int | None, tmp_path: Path
) -> None:
    section, tensors = samples()[kind]
    checkpoint = SafetensorsCheckpoint(write(tmp_path, section, tensors))
    name = EXPERTS if kind == "mxfp4" else WEIGHT
    with pytest.raises(CheckpointError, match=r"has shape .*config\.json asks for") as caught:
        checkpoint.read(name, shape, index)
    assert repr(name) in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_expert_too_many(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write(tmp_path, *samples()["mxfp4"]))
    with pytest.raises(CheckpointError, match=f"'{EXPERTS}'.*has 2 parts"):
        checkpoint.read(EXPERTS, (32, 2), 2)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (awq(bits=3), ["bits 3", "only 4"]),
        (awq(bits=None), ["bits None"]),
        (awq(version="gemv"), ["version 'gemv'", "only gemm"]),
        (awq(version="GEMV_FAST"), ["version 'GEMV_FAST'"]),
        (awq(version="marlin"), ["version 'marlin'"]),
        (awq(version="exllama"), ["version 'exllama'"]),
        (awq(version=None, format="gemv"), ["format 'gemv'"]),
        (awq(backend="llm-awq"), ["backend 'llm-awq'"]),
        (awq(zero_point=False), ["zero_point False"]),
        (awq(group=0), ["group_size 0"]),
        (awq(group_size="128"), ["group_size '128'"]),
        (awq(group_size=None), ["group_size None"]),
        (gptq(bits=3), ["bits 3", "only 4, 8"]),
        (gptq(bits=2), ["bits 2"]),
        (gptq(checkpoint_format="marlin"), ["checkpoint_format 'marlin'", "gptq, gptq_v2"]),
        (gptq(format="bitblas"), ["format 'bitblas'"]),
        (gptq(is_marlin_format=True), ["is_marlin_format"]),
        (gptq(desc_act="yes"), ["desc_act 'yes'"]),
        (gptq(group_size=True), ["group_size True"]),
        (gptq(dynamic={"-:.*a": {}, "+:.*b": {"bits": 8}}), ["dynamic '+:.*b'"]),
        (compressed("nvfp4-pack-quantized"), ["format 'nvfp4-pack-quantized'"]),
        (compressed("marlin-24"), ["format 'marlin-24'", "pack-quantized"]),
        (compressed("mixed-precision"), ["format 'mixed-precision'"]),
        (compressed(num_bits=3), ["num_bits 3", "only 4, 8"]),
        (compressed("int-quantized", num_bits=4), ["num_bits 4"]),
        (compressed(type="float"), ["type 'float'"]),
        (compressed("float-quantized", type="int"), ["type 'int'"]),
        (compressed("float-quantized", symmetric=False), ["symmetric False"]),
        (compressed(strategy="tensor_group"), ["strategy 'tensor_group'"]),
        (compressed(strategy=None, group_size=None), ["strategy 'tensor'"]),
        (compressed("float-quantized", strategy="block"), ["block_structure None"]),
        (
            compressed("float-quantized", strategy="block", block_structure=[128, 0]),
            ["block_structure [128, 0]"],
        ),
        (compressed(actorder="random"), ["actorder 'random'"]),
        (compressed(group_size=-2), ["group_size -2"]),
        (compressed(changed={"sparsity_config": {"format": "sparse-24"}}), ["'sparse-24'"]),
        (compressed(changed={"transform_config": {"a": {}}}), ["transform_config"]),
        (compressed(changed={"config_groups": ["W4A16"]}), ["config_groups"]),
        (compressed(changed={"config_groups": {"W4A16": ["Linear"]}}), ["W4A16"]),
        (compressed(changed={"ignore": ["re:(*"]}), ["ignore", "re:(*"]),
        (compressed(changed={"ignore": [7]}), ["ignore [7]"]),
        (fp8(weight_block_size=[128]), ["weight_block_size [128]"]),
        (fp8(weight_block_size=128), ["weight_block_size 128"]),
        (fp8(expert_dtype="fp4"), ["expert_dtype 'fp4'"]),
    ],
)
def test_variants_that_are_not_read(section: Section, words: list[str], tmp_path: Path) -> None:
    message = refusal(section, {}, tmp_path)
    assert message.startswith("config.json: quantization_config: ")
    assert all(word in message for word in [*words, "unquantized", "headrace quantize"])


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "torchao", "hqq", "quanto", "fbgemm_fp8", "eetq", "marlin", "AWQ", ["awq"]],
)
def test_methods_that_are_not_read(method: Any, tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write(tmp_path, {"quant_method": method}, {}))
    with pytest.raises(CheckpointError) as caught:
        WeightPlan.stored(checkpoint.config)
    message = str(caught.value)
    assert f"quant_method {method!r}" in message and "headrace quantize" in message
    assert all(name in message for name in STORED_FORMATS)


# -- models of them ---------------------------------------------------------------------------

PROMPT = list(range(40, 60))
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


def logits_of(directory: Path, **options: Any) -> Tensor:
    with LLM(str(directory), num_threads=1, dtype="float32", **options) as llm:
        recorder = LogitsRecorder(llm)
        return recorder.logits(llm.generate([PROMPT], GREEDY)[0])


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose layers are in AWQ, and the same unquantized. Not to be altered."""
    directory = tmp_path_factory.mktemp("twins")
    plain = make_checkpoint(directory / "plain", "llama3")
    quantized = copy_checkpoint(plain, directory / "awq")
    names = [n for n in load_file(plain / "model.safetensors") if n.endswith("_proj.weight")]
    dense: Tensors = {}
    packed: Tensors = {}
    for seed, (name, tensor) in enumerate(load_file(plain / "model.safetensors").items()):
        if name in names:
            rows, columns = tensor.shape
            weight = Weight(rows, columns, 16, size=0.2 / columns**0.5, seed=seed)
            dense[name] = weight.dense()
            packed |= pack_awq(weight, name.removesuffix(".weight"))
    edit_tensors(plain, lambda tensors: {**tensors, **dense})
    edit_tensors(
        quantized, lambda tensors: {n: t for n, t in tensors.items() if n not in names} | packed
    )
    edit_config(quantized, quantization_config=awq(16))
    return quantized, plain


def test_a_model_computes_what_its_unquantized_twin_does(twins: tuple[Path, Path]) -> None:
    quantized, plain = twins
    steps: list[tuple[int, int]] = []
    found = logits_of(quantized, progress=lambda done, total: steps.append((done, total)))
    assert torch.equal(found, logits_of(plain))
    assert steps == sorted(steps) and steps[-1][0] <= steps[-1][1]


def test_a_quantized_model_can_be_packed(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """That is no loss to what its unquantized twin has."""
    for source, name in zip(twins, ("quantized", "plain"), strict=True):
        config = EngineConfig(model=str(source), weights="w8a8", num_threads=1)
        quantize_model(config, tmp_path / name)
    assert torch.equal(logits_of(tmp_path / "quantized"), logits_of(tmp_path / "plain"))
    assert torch.equal(logits_of(twins[0], weights="w8a8"), logits_of(tmp_path / "plain"))


def test_the_type_of_a_checkpoint_that_names_none(tmp_path: Path) -> None:
    """It is that of the largest tensor which is not quantized."""
    tensors = {**pack_awq(Weight(16, 64, 32)), "model.embed_tokens.weight": torch.ones(9, 9).half()}
    directory = edit_config(write(tmp_path, awq(), tensors), removed=("torch_dtype",))
    assert SafetensorsCheckpoint(directory).dtype == "float16"
