"""A GGUF file as a checkpoint, with the names, shapes and values that Hugging Face has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.ops.block_weight import Take
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.gguf.architectures import translate
from headrace.weights.gguf.block_types import F32, BlockType, Bytes
from headrace.weights.gguf.file import GGUFFile
from headrace.weights.gguf.recipes import Ids, Matrix, Piece, Recipe
from headrace.weights.stored_blocks import StoredBlocks

CHUNK = 1 << 22
"""Elements that are dequantized at a time: what that takes beside the tensor is bounded."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a weight as the file has them, quantized or not.

    Args:
        type: of the blocks.
        columns: elements of a row.
        blocks: uint8 ``[rows, bytes of a row]``: where the file is mapped if its rows lie there one
            after another, else a copy.
        transposed: whether the rows are the columns of the tensor that was asked for.
    """

    type: BlockType
    columns: int
    blocks: Bytes
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What elements are read in: their own type, or fp32 if they are quantized."""
        return self.type.dtype or torch.float32

    def take(self, ids: Ids) -> StoredRows:
        """The rows ``ids`` in their order; blocks stay as they are."""
        return replace(self, blocks=self.blocks[_span(ids)])

    def values(self) -> Tensor:
        """``[rows, columns]`` in ``dtype``."""
        every = np.arange(len(self.blocks))
        out = torch.empty((len(every), self.columns), dtype=self.dtype)
        self.copy_rows(every, out, every)
        return out

    def copy_rows(self, ids: Ids, out: Tensor, places: Ids) -> None:
        """Write the rows ``ids`` as rows ``places`` of ``out``, in ``dtype`` or fp32."""
        plain = out.dtype == self.type.dtype
        target = (out.view(torch.uint8) if plain else out).numpy()
        step = max(1, CHUNK // self.columns)
        for first in range(0, len(ids), step):
            rows = self.blocks[_span(ids[first : first + step])]
            values = rows if plain else self.type.dequantize(rows)
            target[_span(places[first : first + step])] = values


class GGUFCheckpoint(Checkpoint):
    """What a Hugging Face checkpoint of the model would hold, made of a GGUF file as it is read.

    Attributes:
        directory: that the file is in.
        config: as in the model's ``config.json``.
        file: with all of its metadata.

    Args:
        path: of the file, or of any of its pieces.

    Raises:
        CheckpointError: the file is missing, damaged, or of an unknown architecture.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path.parent
        self.file = GGUFFile(path)
        config, self._recipes = translate(self.file)
        self.config: dict[str, Any] = {**config, "dtype": self.dtype}

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __len__(self) -> int:
        return len(self._recipes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    @property
    def num_bytes(self) -> int:
        """Of all tensors as they are read: those that are quantized in fp32."""
        tensors = self.file.tensors.values()
        return sum(
            math.prod(tensor.shape) * (tensor.type.dtype or torch.float32).itemsize
            for tensor in tensors
        )

    @property
    def dtype(self) -> str:
        """Type of most elements, by torch's name; bfloat16 if these are quantized."""
        counts = {torch.float32: 0, torch.float16: 0, torch.bfloat16: 0}
        for tensor in self.file.tensors.values():
            counts[tensor.type.dtype or torch.bfloat16] += math.prod(tensor.shape)
        return str(max(counts, key=counts.__getitem__)).removeprefix("torch.")

    def kind(self, name: str, index: int | None = None) -> str:
        """See ``Checkpoint``: GGUF's names of its types."""
        recipe = self._recipe(name, index)
        matrices = recipe.matrices
        if recipe.stacked and index is not None:
            matrices = (matrices[index],)
        types = {piece.tensor.type.name for matrix in matrices for piece in matrix.pieces}
        return " and ".join(sorted(types))

    def release(self) -> None:
        """See ``Checkpoint``."""
        self.file.release()

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        """A tensor in memory of its own: in its own type, or fp32 if it was quantized or changed.

        Args:
            index: of its first dimension, if only that part is meant; ``shape`` is the part's.

        Raises:
            CheckpointError: it is missing, or has another shape.
        """
        recipe = self._find(name, shape, index)
        if not recipe.stacked:
            return _read(recipe.matrices[0], index).reshape(shape)
        if index is not None:
            return _read(recipe.matrices[index]).reshape(shape)
        return torch.stack([_read(matrix) for matrix in recipe.matrices]).reshape(shape)

    def view(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        index: int | None = None,
    ) -> Tensor:
        """A tensor where its file is mapped.

        Raises:
            CheckpointError: it is missing, has another shape or dtype than is asked for, or is
                quantized or changed in the file.
        """
        self._find(name, shape, index)
        rows = self.stored_rows(name, index)
        if rows is None or rows.transposed or rows.type.dtype is None or rows.blocks.flags.owndata:
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} is quantized or changed, and must be read"
            )
        if dtype not in (None, rows.dtype):
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} is stored as {rows.dtype}, and not as {dtype}; "
                "it must be read"
            )
        return torch.from_numpy(rows.blocks).view(rows.dtype).reshape(shape)

    def stored_rows(self, name: str, index: int | None = None) -> StoredRows | None:
        """The rows of a tensor, in their order, as blocks of the file.

        Args:
            index: of its first dimension, if only that part is meant.

        Returns:
            ``None`` if it cannot be had so: its values are others than the file's, or its blocks
            are of several types, or blocks lie across its rows and not along them or their columns.

        Raises:
            CheckpointError: it is missing.
        """
        found = self._uniform(name, index)
        if found is None:
            return None
        matrix, index = found
        pieces = [_rows_of(piece) for piece in matrix.pieces]
        rows = pieces[0]
        if len(pieces) > 1:
            rows = replace(rows, blocks=np.concatenate([piece.blocks for piece in pieces]))
        return replace(rows.take(_ids(matrix, index)), transposed=matrix.transposed)

    def blocks(self, name: str, index: int | None = None) -> StoredBlocks | None:
        """See ``Checkpoint``."""
        found = self._uniform(name, index)
        if found is None:
            return None
        matrix, part = found
        type, shape = matrix.pieces[0].tensor.type, matrix.row_shape
        if type.layout is None or len(shape) < 2:
            return None

        def open_rows() -> Take:
            rows = self.stored_rows(name, index)
            assert rows is not None
            return lambda ids: type.parts(rows.take(ids.numpy()).blocks)

        count, columns = len(_ids(matrix, part)), math.prod(shape[1:])
        bits = type.bits_per_weight
        return StoredBlocks(type.layout, bits, count, columns, open_rows, matrix.transposed)

    def _uniform(self, name: str, index: int | None) -> tuple[Matrix, int | None] | None:
        """The matrix that a tensor, or its part, is made of, and the row of it if it is only that.

        ``None`` if it is not made of whole rows of one type.
        """
        recipe = self._recipe(name, index)
        matrix = recipe.matrices[0]
        if recipe.stacked:
            if index is None:
                return None
            matrix, index = recipe.matrices[index], None
        one_type = len({piece.tensor.type for piece in matrix.pieces}) == 1
        across = any(piece.transposed for piece in matrix.pieces)
        if matrix.undo is not None or not one_type or across:
            return None
        return None if matrix.transposed and index is not None else (matrix, index)

    def _recipe(self, name: str, index: int | None) -> Recipe:
        if name not in self._recipes:
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} is missing in the weights; take another "
                "file, or convert the original model again"
            )
        recipe = self._recipes[name]
        if index is not None and index >= recipe.shape[0]:
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} has {recipe.shape[0]} parts, but the model "
                f"asks for more than {index}; convert the original model again"
            )
        return recipe

    def _find(self, name: str, shape: tuple[int, ...], index: int | None) -> Recipe:
        """The recipe of a tensor of that shape; dimensions of 1 come and go with conversion."""
        recipe = self._recipe(name, index)
        found = recipe.shape if index is None else recipe.shape[1:]
        if [size for size in found if size > 1] != [size for size in shape if size > 1]:
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} has shape {list(found)}, but the model asks "
                f"for {list(shape)}; tensors and metadata do not belong together: convert the "
                "original model again"
            )
        return recipe


def _read(matrix: Matrix, index: int | None = None) -> Tensor:
    """A matrix, or one row of it."""
    out = _gather([_upright(_rows_of(piece)) for piece in matrix.pieces], _ids(matrix, index))
    if matrix.undo is not None:
        out = matrix.undo(out.float())
    if matrix.transposed:
        out = out.T if index is None else out[:, index]
    return out.contiguous()


def _ids(matrix: Matrix, index: int | None) -> Ids:
    """The stored rows that make a matrix, or its row ``index`` where rows are rows."""
    ids = matrix.rows()
    return ids if index is None or matrix.transposed else ids[index : index + 1]


def _rows_of(piece: Piece) -> StoredRows:
    """All of a piece, as it lies in the file."""
    tensor, shape = piece.tensor, piece.stored_shape
    if len(shape) == 1 and tensor.type.size > 1:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} is a vector of type {tensor.type.name}, which "
            "is not supported; convert the original model again"
        )
    data = tensor.data
    if piece.part is not None:
        data = data.reshape(tensor.shape[0], -1)[piece.part]
    blocks = data.reshape(shape[0], -1)
    return StoredRows(tensor.type, math.prod(shape[1:]), blocks, piece.transposed)


def _upright(rows: StoredRows) -> StoredRows:
    """The same with rows that are rows."""
    if not rows.transposed:
        return rows
    values = rows.values().float().T.contiguous()
    return StoredRows(F32, values.shape[1], values.view(torch.uint8).numpy())


def _gather(pieces: Sequence[StoredRows], ids: Ids) -> Tensor:
    """Rows ``ids`` of all rows of the pieces, ``[len(ids), columns]``."""
    dtypes = {piece.dtype for piece in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    out = torch.empty((len(ids), pieces[0].columns), dtype=dtype)
    first = 0
    for piece in pieces:
        end = first + len(piece.blocks)
        places = np.flatnonzero((ids >= first) & (ids < end))
        piece.copy_rows(ids[places] - first, out, places)
        first = end
    return out


def _span(ids: Ids) -> slice | Ids:
    """The same places, as a slice where they follow one another, so that none is copied."""
    if len(ids) and bool((np.diff(ids) == 1).all()):
        return slice(int(ids[0]), int(ids[-1]) + 1)
    return ids
