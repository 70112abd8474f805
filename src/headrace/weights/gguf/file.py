"""GGUF files, versions 2 and 3: what they say, and where their tensors are.

The format is that of ggml's ``docs/gguf.md``. Nothing in a file is believed: each length is held
against the bytes that are left before it is used.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import CheckpointError
from headrace.weights.gguf.block_types import BlockType, Bytes, find_block_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

_U32, _U64, _F32 = np.dtype("<u4"), np.dtype("<u8"), np.dtype("<f4")
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: _U32,
    5: np.dtype("<i4"),
    6: _F32,
    10: _U64,
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Types of metadata that are numbers."""
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")
_LEAST_VALUE_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
_PIECE_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file.

    Args:
        path: of the file.
        shape: in torch's order, the dimension whose elements lie side by side last.
        type: of the elements.
        offset: of its first byte in the file.
        data: its bytes where the file is mapped.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    data: Bytes

    def values(self) -> NDArray[np.float32]:
        """All elements in fp32, in a shape of one dimension; meant for small tensors."""
        return self.type.dequantize(self.data.reshape(1, -1)).ravel()


@dataclass(frozen=True, slots=True)
class _Content:
    """One file: its metadata by key and its tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    data: mmap.mmap


class GGUFFile:
    """A model in a file, or in the pieces that it was split into.

    Attributes:
        path: as it was given.
        paths: of all pieces.
        metadata: by key. Arrays of numbers are numpy arrays, those of strings are lists. A float32
            is the shortest decimal that rounds to it. Bytes that are no UTF-8 become lone
            surrogates.
        tensors: by name.

    Args:
        path: of the file, or of any of its pieces.

    Raises:
        CheckpointError: there is no such file, it is damaged or of another kind, or a piece is
            missing; says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _read(path)
        self.paths = _piece_paths(path, _whole_number(path, first.metadata, "split.count", 1))
        pieces = [first if piece == path else _read(piece) for piece in self.paths]
        self.metadata: dict[str, Any] = pieces[0].metadata
        self.tensors: dict[str, StoredTensor] = {}
        for number, (piece, content) in enumerate(zip(self.paths, pieces, strict=True)):
            if len(pieces) > 1:
                self._check_piece(piece, content, number)
            for name, tensor in content.tensors.items():
                if name in self.tensors:
                    raise _damaged(piece, f"tensor {name!r} is in {self.tensors[name].path} too")
                self.tensors[name] = tensor
        self._data = [piece.data for piece in pieces]
        promised = _whole_number(path, self.metadata, "split.tensors.count", len(self.tensors))
        if promised != len(self.tensors):
            raise _damaged(path, f"there are {len(self.tensors)} tensors in place of {promised}")

    def release(self) -> None:
        """Give up the memory of bytes that were read; the files give them again.

        What was written to views of them is lost.
        """
        for data in self._data:
            data.madvise(mmap.MADV_DONTNEED)

    def _check_piece(self, path: Path, content: _Content, number: int) -> None:
        for key, wanted in (("split.no", number), ("split.count", len(self.paths))):
            found = _whole_number(path, content.metadata, key, -1)
            if found != wanted:
                raise _damaged(path, f"{key} is {found}, and by the file's name it is {wanted}")


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated: {problem}; fetch it again")


def _whole_number(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _damaged(path, f"{key} must be an integer, and is {value!r}")
    return value


def _piece_paths(path: Path, count: int) -> list[Path]:
    """All pieces of the model of which ``path`` is one."""
    if count <= 1:
        return [path]
    match = _PIECE_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} pieces, but not named like one; give them the names "
            f"NAME-00001-of-{count:05d}.gguf and so on"
        )
    paths = [
        path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    for piece in paths:
        if not piece.is_file():
            raise CheckpointError(
                f"{piece} does not exist, and {path.name} is one of {count} pieces; fetch all"
            )
    return paths


class _Header:
    """Reads a mapped file from front to back."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._position = path, data, len(MAGIC)

    @property
    def position(self) -> int:
        """Of the next byte."""
        return self._position

    def fail(self, problem: str) -> CheckpointError:
        """An error that names the file."""
        return _damaged(self._path, problem)

    def numbers(self, dtype: np.dtype[Any], count: int, what: str) -> NDArray[Any]:
        """The next ``count`` numbers."""
        start, size = self._position, dtype.itemsize * count
        if size > len(self._data) - start:
            raise self.fail(f"{what} ends behind the file")
        self._position = start + size
        return np.frombuffer(self._data, dtype, count, start).copy()

    def integer(self, dtype: np.dtype[Any], what: str) -> int:
        """The next number."""
        return int(self.numbers(dtype, 1, what)[0])

    def count(self, least_bytes: int, what: str) -> int:
        """How many things come, each of at least so many bytes."""
        found, left = self.integer(_U64, f"the number of {what}"), len(self._data) - self._position
        if found * least_bytes > left:
            raise self.fail(f"{found} {what} do not fit into the {left} bytes that are left")
        return found

    def strings(self, count: int, what: str) -> list[str]:
        """The next ``count`` strings. A vocabulary has hundreds of thousands."""
        data, size, position = self._data, len(self._data), self._position
        found = []
        for _ in range(count):
            start = position + _LENGTH.size
            if start > size:
                raise self.fail(f"{what} ends behind the file")
            position = start + _LENGTH.unpack_from(data, position)[0]
            if position > size:
                raise self.fail(f"{what} ends behind the file")
            found.append(data[start:position].decode("utf-8", "surrogateescape"))
        self._position = position
        return found

    def name(self, what: str) -> str:
        """The next string, which must be UTF-8."""
        (name,) = self.strings(1, what)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise self.fail(f"{what}, {name!r}, is no UTF-8") from None
        return name

    def value(self, key: str) -> Any:
        """The value of metadata that comes next."""
        what = f"the value of {key!r}"
        kind = self.integer(_U32, what)
        if kind == _STRING:
            return self.strings(1, what)[0]
        if kind != _ARRAY:
            return _plain(self._numbers_of(kind, 1, what)[0])
        kind = self.integer(_U32, what)
        if kind == _STRING:
            return self.strings(self.count(_LENGTH.size, f"strings of {key!r}"), what)
        return self._numbers_of(kind, self.count(1, f"elements of {key!r}"), what)

    def _numbers_of(self, kind: int, count: int, what: str) -> NDArray[Any]:
        if kind == _BOOL:
            flags = self.numbers(_NUMBERS[0], count, what)
            if bool((flags > 1).any()):
                raise self.fail(f"{what} is neither true nor false")
            return flags.astype(bool)
        if kind not in _NUMBERS:
            raise self.fail(f"{what} has type {kind}, which is unknown")
        return self.numbers(_NUMBERS[kind], count, what)


def _plain(value: Any) -> bool | int | float:
    """A numpy number as Python's."""
    if value.dtype == _F32:
        return float(str(value))
    plain: bool | int | float = value.item()
    return plain


def _read(path: Path) -> _Content:
    """A file. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            # Private to the process, so that views may be written to, as torch expects of them.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except ValueError:
        raise _damaged(path, "it is empty") from None
    header = _Header(path, data)
    _check_version(path, data, header)
    num_tensors = header.count(_LEAST_TENSOR_BYTES, "tensors")
    num_values = header.count(_LEAST_VALUE_BYTES, "values of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = header.name("a key of metadata")
        if key in metadata:
            raise header.fail(f"{key!r} is in the metadata twice")
        metadata[key] = header.value(key)
    entries = [_read_entry(header) for _ in range(num_tensors)]
    alignment = _alignment(path, metadata)
    start = -(-header.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for tensor in _place(path, data, start, alignment, entries):
        if tensor.name in tensors:
            raise header.fail(f"tensor {tensor.name!r} is there twice")
        tensors[tensor.name] = tensor
    return _Content(metadata, tensors, data)


def _check_version(path: Path, data: mmap.mmap, header: _Header) -> None:
    if data[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{path} is no GGUF file, for it begins with {data[: len(MAGIC)]!r}; fetch it again, "
            "or give the file that holds the model"
        )
    version = header.integer(_U32, "the version")
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"{path} is big endian, which is not supported; convert the model for little-endian "
            "machines"
        )
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path}: version {version} of GGUF is not supported, only "
            f"{' and '.join(map(str, VERSIONS))}; convert the original model again"
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the header has it; ``offset`` counts from the first tensor's."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _read_entry(header: _Header) -> _Entry:
    name = header.name("the name of a tensor")
    what = f"the entry of tensor {name!r}"
    rank = header.integer(_U32, what)
    if rank > MOST_DIMENSIONS:
        raise header.fail(f"tensor {name!r} has {rank} dimensions, more than {MOST_DIMENSIONS}")
    sizes = header.numbers(_U64, rank, what).tolist()
    if 0 in sizes:
        raise header.fail(f"tensor {name!r} has no elements")
    kind, offset = header.integer(_U32, what), header.integer(_U64, what)
    return _Entry(name, tuple(reversed(sizes)) or (1,), kind, offset)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    """Of the tensors' first bytes."""
    alignment = _whole_number(path, metadata, ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if alignment < 8 or alignment & (alignment - 1):
        raise _damaged(path, f"{ALIGNMENT_KEY} is {alignment}, and must be 8, 16, 32 and so on")
    return alignment


def _place(
    path: Path, data: mmap.mmap, start: int, alignment: int, entries: list[_Entry]
) -> Iterator[StoredTensor]:
    """The tensors, in the order of their bytes, which no other tensor has."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        name, shape = entry.name, entry.shape
        try:
            type = find_block_type(entry.type)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}") from None
        if shape[-1] % type.size:
            raise _damaged(
                path,
                f"rows of tensor {name!r} have {shape[-1]} elements, which are no whole blocks of "
                f"{type.size}, as type {type.name} has them",
            )
        if entry.offset % alignment or entry.offset < end:
            problem = "is not aligned" if entry.offset % alignment else "overlaps another"
            raise _damaged(path, f"tensor {name!r} {problem}, at byte {entry.offset} of the data")
        size = math.prod(shape[:-1]) * type.row_bytes(shape[-1])
        end = entry.offset + size
        if start + end > len(data):
            raise _damaged(path, f"tensor {name!r} ends behind the file")
        place = start + entry.offset
        yield StoredTensor(
            path, name, shape, type, place, np.frombuffer(data, np.uint8, size, place)
        )
