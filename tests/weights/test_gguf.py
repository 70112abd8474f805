"""GGUF files: the format, whole or damaged, and the types of elements."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import CheckpointError
from headrace.weights.gguf.block_types import BLOCK_TYPES, BlockType, find_block_type
from headrace.weights.gguf.file import GGUFFile
from tests.support.gguf_files import (
    RawTensor,
    encoded,
    numbers,
    random_blocks,
    reference_values,
    refusal,
    split_gguf,
    write_gguf,
)

TYPES = {type.name: type for type in BLOCK_TYPES}


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_values_are_those_of_the_reference(type: BlockType) -> None:
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.name]]
    assert (type.size, type.num_bytes) == (size, num_bytes)
    for seed in range(20):
        rows = random_blocks(type, 33, 3 * 256, seed)
        found, expected = type.dequantize(rows), reference_values(type, rows)
        assert found.dtype == np.float32 and found.shape == (33, 3 * 256)
        undefined = np.isnan(expected)
        assert np.array_equal(np.isnan(found), undefined)
        same = found.view(np.uint32) == expected.view(np.uint32)
        assert bool((same | undefined).all())


def test_random_scales_are_of_every_kind() -> None:
    """The comparison above met NaN, infinity and denormal numbers."""
    values = TYPES["Q8_0"].dequantize(random_blocks(TYPES["Q8_0"], 1000, 768))
    assert np.isnan(values).any() and np.isinf(values).any()
    scales = TYPES["F16"].dequantize(random_blocks(TYPES["F16"], 100, 768))
    assert (np.abs(scales[scales != 0]) < 6.1e-5).any()


@pytest.mark.parametrize("number", [16, 24, 4, 99, 2**32 - 1])
def test_other_types_are_named(number: int) -> None:
    message = refusal(lambda: find_block_type(number))
    known = {16: "IQ2_XXS", 24: "I8"}
    assert known.get(number, str(number)) in message
    assert all(type.name in message for type in BLOCK_TYPES)


# -- the format -------------------------------------------------------------------------------

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.number": 7,
    "a.share": 1e-5,
    "a.wide": np.uint64(2**40),
    "a.low": np.int32(-5),
    "a.byte": np.uint8(200),
    "a.double": np.float64(0.1),
    "a.words": ["", "water", "Mühle", "水車"],
    "a.row": np.array([1, -2, 3], np.int32),
    "a.shares": np.array([0.5, 0.25], np.float32),
    "a.flags": np.array([True, False]),
}


def small_file(path: Path, **options: Any) -> Path:
    """A file with values of all kinds and tensors of several types."""
    torch.manual_seed(0)
    tensors = [
        numbers("vector", 5),
        encoded("halves", torch.randn(3, 4), "F16"),
        encoded("blocks", torch.randn(2, 64), "Q8_0"),
        encoded("cube", torch.randn(2, 3, 4), "BF16"),
    ]
    return write_gguf(path, METADATA, tensors, **options)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_what_a_file_says(version: int, alignment: int, tmp_path: Path) -> None:
    metadata = {**METADATA, "general.alignment": alignment}
    tensors = [numbers("vector", 5), encoded("blocks", torch.ones(2, 3, 64), "Q8_0")]
    path = write_gguf(tmp_path / "a.gguf", metadata, tensors, version=version, alignment=alignment)
    file = GGUFFile(path)
    assert list(file.metadata) == list(metadata) and file.paths == [path]
    for key, value in metadata.items():
        found = file.metadata[key]
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype and np.array_equal(found, value)
        else:
            assert found == value and type(found) in (bool, int, float, str, list)
    vector, blocks = file.tensors["vector"], file.tensors["blocks"]
    assert vector.shape == (5,) and vector.type == TYPES["F32"]
    assert vector.values().tolist() == [0, 1, 2, 3, 4]
    assert blocks.shape == (2, 3, 64) and blocks.type == TYPES["Q8_0"]
    assert blocks.data.tobytes() == tensors[1].data
    assert blocks.offset % alignment == 0
    content = path.read_bytes()
    assert content[blocks.offset : blocks.offset + blocks.data.nbytes] == tensors[1].data


def test_bytes_that_are_no_text_stay_in_the_vocabulary(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", {"words": ["a", b"\xff\x80"]}))
    assert file.metadata["words"][1].encode("utf-8", "surrogateescape") == b"\xff\x80"


def test_a_large_vocabulary(tmp_path: Path) -> None:
    words = [f"word {number}" for number in range(250_000)]
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", {"words": words}))
    assert file.metadata["words"] == words


def test_pieces_are_one_model(tmp_path: Path) -> None:
    tensors = [numbers(f"t{number}", 3, number + 1) for number in range(5)]
    paths = split_gguf(tmp_path, METADATA, [tensors[:2], tensors[2:3], tensors[3:]])
    for path in paths:
        file = GGUFFile(path)
        assert file.paths == paths and set(file.tensors) == {f"t{number}" for number in range(5)}
        assert file.metadata["a.words"] == METADATA["a.words"]
        assert all(file.tensors[t.name].data.tobytes() == t.data for t in tensors)


def test_pieces_that_do_not_make_one_model(tmp_path: Path) -> None:
    tensors = [numbers(f"t{number}", 3) for number in range(3)]
    paths = split_gguf(tmp_path, METADATA, [tensors[:1], tensors[1:2], tensors[2:]])
    renamed = paths[0].rename(tmp_path / "model.gguf")
    message = refusal(lambda: GGUFFile(renamed))
    assert str(renamed) in message and "-00001-of-00003.gguf" in message
    renamed.rename(paths[0])
    content = paths[1].read_bytes()
    paths[1].unlink()
    assert str(paths[1]) in refusal(lambda: GGUFFile(paths[0]))
    paths[1].write_bytes(paths[2].read_bytes())
    message = refusal(lambda: GGUFFile(paths[0]))
    assert str(paths[1]) in message and "split.no" in message
    paths[1].write_bytes(content)
    assert len(GGUFFile(paths[2]).tensors) == 3
    other = split_gguf(tmp_path, METADATA, [tensors[:1], tensors[:1], tensors[2:]])
    assert "'t0'" in refusal(lambda: GGUFFile(other[0]))


# -- damaged files ----------------------------------------------------------------------------


def write_metadata(path: Path, values: bytes, count: int = 1) -> Path:
    """A file with metadata as they are given."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, count) + values)
    return path


def key_of(kind: int, key: bytes = b"k") -> bytes:
    """A key and the type of its value."""
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"GGML" + struct.pack("<IQQ", 3, 0, 0), ["b'GGML'", "no GGUF file"]),
        (b"<!DOCTYPE html>" + b" " * 40, ["no GGUF file"]),
        (b"", ["empty"]),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big endian", "convert"]),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), ["version 1", "2 and 3"]),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), ["version 4", "2 and 3"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), [f"{2**63} tensors"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), [f"{2**63} values of metadata"]),
    ],
)
def test_beginnings(head: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(head)
    message = refusal(lambda: GGUFFile(path))
    assert all(word in message for word in [str(path), *words]), message


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        assert str(path) in refusal(lambda path=path: GGUFFile(path))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (key_of(13) + b"\0" * 8, ["type 13", "'k'"]),
        (key_of(9) + struct.pack("<IQ", 9, 0) + b"\0" * 8, ["type 9", "'k'"]),
        (key_of(9) + struct.pack("<IQ", 8, 2**60), [f"{2**60} strings", "'k'"]),
        (key_of(9) + struct.pack("<IQ", 4, 2**62), [f"{2**62} elements", "'k'"]),
        (key_of(9) + struct.pack("<IQ", 10, 5) + b"\0" * 8, ["ends behind the file", "'k'"]),
        (key_of(8) + struct.pack("<Q", 2**64 - 1), ["ends behind the file", "'k'"]),
        (key_of(7) + b"\2" + b"\0" * 8, ["neither true nor false"]),
        (key_of(4, b"\xff") + b"\0" * 8, ["UTF-8"]),
        (struct.pack("<Q", 2**50) + b"\0" * 20, ["key", "ends behind the file"]),
    ],
)
def test_metadata(values: bytes, words: list[str], tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "a.gguf", values)
    message = refusal(lambda: GGUFFile(path))
    assert all(word in message for word in [str(path), "fetch it again", *words]), message


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    value = key_of(4) + struct.pack("<I", 1)
    path = write_metadata(tmp_path / "a.gguf", value + value, count=2)
    assert "'k'" in refusal(lambda: GGUFFile(path)) and "twice" in refusal(lambda: GGUFFile(path))


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33, True, "32", np.float32(32)])
def test_alignment(alignment: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"general.alignment": alignment}, [numbers("a", 3)])
    message = refusal(lambda: GGUFFile(path))
    assert "general.alignment" in message and str(path) in message


def raw(name: str, shape: Sequence[int], type: int = 0, size: int = 64) -> RawTensor:
    """A tensor whose entry may be wrong."""
    return RawTensor(name, tuple(shape), type, bytes(size))


@pytest.mark.parametrize(
    ("tensors", "offsets", "words"),
    [
        ([raw("a", [4]), raw("a", [4])], None, ["'a'", "twice"]),
        ([raw("a", [16]), raw("b", [16])], [0, 32], ["'b'", "overlaps"]),
        ([raw("a", [16]), raw("b", [16])], [64, 64], ["overlaps"]),
        ([raw("a", [4]), raw("b", [4])], [0, 36], ["'b'", "not aligned"]),
        ([raw("a", [17])], None, ["'a'", "ends behind the file"]),
        ([raw("a", [4])], [2**63], ["'a'", "ends behind the file"]),
        ([raw("a", [2**40, 2**40, 2**40])], None, ["'a'", "ends behind the file"]),
        ([raw("a", [4, 0])], None, ["'a'", "no elements"]),
        ([raw("a", [1, 1, 1, 1, 1])], None, ["'a'", "5 dimensions"]),
        ([raw("a", [2, 31], 8)], None, ["'a'", "31 elements", "blocks of 32"]),
        ([raw("a", [1, 256], 16)], None, ["'a'", "IQ2_XXS", "Q4_K"]),
        ([raw("a", [4], 777)], None, ["'a'", "777"]),
    ],
)
def test_tensors(
    tensors: list[RawTensor], offsets: list[int] | None, words: list[str], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", METADATA, tensors, offsets=offsets)
    message = refusal(lambda: GGUFFile(path))
    assert all(word in message for word in [str(path), *words]), message


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with values and tensors of all kinds. Not to be altered."""
    return small_file(tmp_path_factory.mktemp("small") / "a.gguf")


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "cut.gguf"
    last = GGUFFile(small).tensors["cube"]
    for size in range(last.offset + last.data.nbytes):
        path.write_bytes(content[:size])
        assert str(path) in refusal(lambda: GGUFFile(path))


@given(st.data())
def test_random_bytes_are_read_or_refused(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(small.read_bytes())
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flipped") / "a.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        for tensor in GGUFFile(path).tensors.values():
            assert tensor.values().size == math.prod(tensor.shape)
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20 and str(path) in message
