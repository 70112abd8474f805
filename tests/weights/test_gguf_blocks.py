"""Tensors of GGUF files in memory: by rows and parts, as blocks, and where files are mapped."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.json_file import read_json
from headrace.weights.gguf import checkpoint as checkpoint_module
from headrace.weights.gguf.block_types import BLOCK_TYPES, BlockType, find_block_type
from headrace.weights.gguf.checkpoint import GGUFCheckpoint
from headrace.weights.gguf.file import GGUFFile
from tests.support.gguf_files import (
    RawTensor,
    convert,
    convert_tensors,
    encoded,
    random_blocks,
    reference_values,
    refusal,
    side_by_side,
    write_gguf,
)
from tests.support.gguf_models import stored_tensors

TYPES = {type.name: type for type in BLOCK_TYPES}

HEADS, WIDTH, HIDDEN, STORED_ROWS = 4, 64, 512, 256


def random_tensor(name: str, type: BlockType, rows: int, columns: int) -> RawTensor:
    """Random values, or random blocks whose scales are finite."""
    if type.dtype is not None:
        return encoded(name, torch.randn(rows, columns), type.name)
    kept = random_blocks(type, 8 * rows, columns)
    kept = kept[np.isfinite(reference_values(type, kept)).all(axis=1)]
    assert len(kept) >= rows
    return RawTensor(name, (rows, columns), type.number, kept[:rows].tobytes())


@pytest.fixture(params=["Q8_0", "Q4_K", "F16", "BF16"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[GGUFCheckpoint, RawTensor]:
    """A Llama of one layer whose query projection is of one type, and that as it is stored."""
    type = TYPES[request.param]
    query = random_tensor("blk.0.attn_q.weight", type, STORED_ROWS, HIDDEN)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": HEADS,
        "llama.attention.key_length": WIDTH,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }
    embedding = encoded("token_embd.weight", torch.randn(10, HIDDEN), "Q8_0")
    path = write_gguf(tmp_path / "a.gguf", metadata, [query, embedding])
    return GGUFCheckpoint(path), query


Stored = tuple[GGUFCheckpoint, RawTensor]
QUERY = "model.layers.0.self_attn.q_proj.weight"


def original_order() -> Tensor:
    """For each row of the original, the row that it is in the file."""
    places = side_by_side(torch.arange(STORED_ROWS).unsqueeze(1), HEADS)[:, 0]
    return places.argsort()


def whole_values(query: RawTensor) -> Tensor:
    """All of the stored matrix, dequantized by the reference."""
    type = find_block_type(query.type)
    rows = np.frombuffer(query.data, np.uint8).reshape(query.shape[0], -1)
    return torch.from_numpy(reference_values(type, rows).copy())


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 22])
def test_rows_are_in_the_original_order(
    stored: Stored, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, query = stored
    monkeypatch.setattr(checkpoint_module, "CHUNK", chunk)
    expected = whole_values(query)[original_order()]
    assert torch.equal(checkpoint.read(QUERY, (STORED_ROWS, HIDDEN)).float(), expected)


def test_parts_are_those_of_the_whole(stored: Stored) -> None:
    checkpoint, query = stored
    expected = whole_values(query)[original_order()]
    for index in (0, 1, 77, STORED_ROWS - 1):
        assert torch.equal(checkpoint.read(QUERY, (HIDDEN,), index).float(), expected[index])
        rows = checkpoint.stored_rows(QUERY, index)
        assert rows is not None and torch.equal(rows.values()[0].float(), expected[index])


def test_blocks_are_put_in_order_as_they_are(stored: Stored) -> None:
    checkpoint, query = stored
    rows = checkpoint.stored_rows(QUERY)
    assert rows is not None and not rows.transposed
    assert rows.type.number == query.type and rows.columns == HIDDEN
    blocks = np.frombuffer(query.data, np.uint8).reshape(STORED_ROWS, -1)
    assert np.array_equal(rows.blocks, blocks[original_order().numpy()])
    chosen = np.array([5, 3, 3, 200])
    expected = whole_values(query)[original_order()][chosen]
    assert torch.equal(rows.take(chosen).values().float(), expected)


def test_rows_in_order_are_not_copied(stored: Stored) -> None:
    checkpoint, _ = stored
    rows = checkpoint.stored_rows("model.embed_tokens.weight")
    data = checkpoint.file.tensors["token_embd.weight"].data
    assert rows is not None and np.shares_memory(rows.blocks, data)
    assert np.shares_memory(rows.take(np.arange(3, 7)).blocks, data)


def test_a_part_takes_little_memory(tmp_path: Path, stored: Stored) -> None:
    checkpoint, _ = stored
    checkpoint.read(QUERY, (HIDDEN,), 0)
    tracemalloc.start()
    checkpoint.read(QUERY, (HIDDEN,), 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < STORED_ROWS * HIDDEN // 4


def test_experts_of_a_mixture(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """Each is a part of the blocks that hold all."""
    directory = originals("mixtral")
    config = read_json(directory / "config.json")

    def encode(name: str, tensor: Tensor) -> RawTensor:
        return encoded(name, tensor, "Q8_0" if "gate_exps" in name else "F32")

    metadata, tensors = convert_tensors(config, load_file(directory / "model.safetensors"), encode)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", metadata, tensors))
    (all_gates,) = [t for t in tensors if t.name == "blk.1.ffn_gate_exps.weight"]
    blocks = np.frombuffer(all_gates.data, np.uint8).reshape(5, 112, -1)
    for expert in range(5):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        rows = checkpoint.stored_rows(name)
        assert rows is not None and np.array_equal(rows.blocks, blocks[expert])
        assert not rows.blocks.flags.owndata
        expected = reference_values(TYPES["Q8_0"], blocks[expert])
        assert np.array_equal(checkpoint.read(name, (112, 64)).numpy(), expected)


def test_blocks_of_gpt_oss(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows of gate and up, which come in turn, and transposed in the original."""
    directory = originals("gpt_oss")
    config = read_json(directory / "config.json")

    def encode(name: str, tensor: Tensor) -> RawTensor:
        kinds = {"blk.0.ffn_gate_exps.weight": "MXFP4", "blk.0.ffn_up_exps.weight": "MXFP4"}
        kinds |= {"blk.1.ffn_up_exps.weight": "Q8_0"}
        return encoded(name, tensor, kinds.get(name, "F32"))

    metadata, tensors = convert_tensors(config, load_file(directory / "model.safetensors"), encode)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", metadata, tensors))
    by_name = {tensor.name: tensor for tensor in tensors}

    def parts(name: str) -> np.ndarray:
        tensor = by_name[name]
        type = find_block_type(tensor.type)
        rows = np.frombuffer(tensor.data, np.uint8).reshape(6 * 48, -1)
        return reference_values(type, rows).reshape(6, 48, 64)

    for layer in (0, 1):
        gate, up = (parts(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        expected = torch.from_numpy(np.stack((gate, up), axis=2).reshape(6, 96, 64))
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        assert torch.equal(checkpoint.read(name, (6, 64, 96)), expected.transpose(1, 2))
        assert torch.equal(checkpoint.read(name, (64, 96), 4), expected[4].T)
        rows = checkpoint.stored_rows(name, 4)
        if layer == 0:
            assert rows is not None and rows.transposed and rows.type == TYPES["MXFP4"]
            assert torch.equal(rows.values(), expected[4])
        else:
            assert rows is None
        assert checkpoint.stored_rows(name) is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gemma2", "model.norm.weight"),
        ("mamba2", "backbone.layers.0.mixer.A_log"),
        ("deepseek_v2", "model.layers.1.self_attn.kv_b_proj.weight"),
    ],
)
def test_what_is_computed_has_no_blocks(
    name: str, tensor: str, originals: Callable[[str], Path]
) -> None:
    assert GGUFCheckpoint(originals(name) / "model.gguf").stored_rows(tensor) is None


def test_transposed_projections(originals: Callable[[str], Path]) -> None:
    directory = originals("gpt2")
    checkpoint = GGUFCheckpoint(directory / "model.gguf")
    name = "transformer.h.1.attn.c_attn.weight"
    expected = stored_tensors(directory)[name]
    rows = checkpoint.stored_rows(name)
    assert rows is not None and rows.transposed and torch.equal(rows.values(), expected.T)
    assert checkpoint.stored_rows(name, 3) is None
    assert torch.equal(checkpoint.read(name, (192,), 3), expected[3])


def test_views(originals: Callable[[str], Path]) -> None:
    directory = originals("qwen2")
    checkpoint = GGUFCheckpoint(directory / "model.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = stored_tensors(directory)[name]
    data = checkpoint.file.tensors["blk.0.ffn_up.weight"].data
    for view in (
        checkpoint.view(name, (112, 64)),
        checkpoint.view(name, (112, 64), torch.float32),
    ):
        assert torch.equal(view, expected) and np.shares_memory(view.numpy(), data)
    assert torch.equal(checkpoint.view(name, (64,), index=9), expected[9])
    assert "bfloat16" in refusal(lambda: checkpoint.view(name, (112, 64), torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.weight", (64, 64)),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", (64, 256)),
        ("gemma2", "model.norm.weight", (64,)),
    ],
)
def test_what_was_changed_cannot_be_viewed(
    name: str, tensor: str, shape: tuple[int, ...], originals: Callable[[str], Path]
) -> None:
    checkpoint = GGUFCheckpoint(originals(name) / "model.gguf")
    message = refusal(lambda: checkpoint.view(tensor, shape))
    assert repr(tensor) in message and "must be read" in message


def test_reading_gives_memory_of_its_own(originals: Callable[[str], Path]) -> None:
    checkpoint = GGUFCheckpoint(originals("qwen2") / "model.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    before = checkpoint.read(name, (112, 64))
    checkpoint.read(name, (112, 64)).zero_()
    assert torch.equal(checkpoint.read(name, (112, 64)), before) and before.any()


def test_types_and_bytes(originals: Callable[[str], Path], tmp_path: Path) -> None:
    directory = originals("llama")
    for type, dtype in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
        path = tmp_path / f"{type}.gguf"

        def encode(name: str, tensor: Tensor, type: str = type) -> RawTensor:
            return encoded(name, tensor, type if tensor.ndim > 1 else "F32")

        checkpoint = GGUFCheckpoint(convert(directory, path, encode))
        assert checkpoint.dtype == checkpoint.config["dtype"] == dtype
        name = "model.layers.0.self_attn.q_proj.weight"
        expected = stored_tensors(directory)[name].to(getattr(torch, dtype))
        assert torch.equal(checkpoint.read(name, (64, 64)), expected)
        tensors = checkpoint.file.tensors.values()
        width = {"float32": 4}.get(dtype, 2)
        sizes = [math.prod(t.shape) * (width if len(t.shape) > 1 else 4) for t in tensors]
        assert checkpoint.num_bytes == sum(sizes)


def test_quantized_files_are_computed_in_bfloat16(
    originals: Callable[[str], Path], tmp_path: Path
) -> None:
    def encode(name: str, tensor: Tensor) -> RawTensor:
        return encoded(name, tensor, "Q8_0" if tensor.shape[-1] == 64 != tensor.numel() else "F32")

    checkpoint = GGUFCheckpoint(convert(originals("llama"), tmp_path / "a.gguf", encode))
    assert checkpoint.dtype == "bfloat16"


@given(st.data())
def test_damaged_models_are_read_or_refused(
    originals: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    """Of the header, bytes are changed; what opens, reads."""
    source = originals(data.draw(st.sampled_from(["llama", "gpt_oss", "deepseek_v2", "gpt2"])))
    content = bytearray((source / "model.gguf").read_bytes())
    header = min(t.offset for t in GGUFFile(source / "model.gguf").tensors.values())
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.gguf"
    path.write_bytes(content)
    message = str(path)
    try:
        checkpoint = GGUFCheckpoint(path)
        for name in checkpoint:
            checkpoint.stored_rows(name, 0)
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
