"""How tensors of a Hugging Face checkpoint are made of those in a file.

A converter renames tensors, and it changes some of them: rows change places, matrices are
transposed, cut or put together, values are changed. A recipe undoes that, where it can without
touching values, so that quantized blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headrace.weights.gguf.file import StoredTensor

Ids = NDArray[np.int64]
Order = Callable[[int], Ids]
"""Number of rows -> for each of them, which of the stored rows it is."""
Undo = Callable[[Tensor], Tensor]
"""Stored values in fp32 -> the tensor's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the file, or a part of it: a matrix, or a vector.

    Args:
        part: of its first dimension; ``None``: all of it.
        transposed: whether its last two dimensions have changed places.
    """

    tensor: StoredTensor
    part: int | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As its elements lie in the file."""
        return self.tensor.shape if self.part is None else self.tensor.shape[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is meant."""
        return swapped(self.stored_shape) if self.transposed else self.stored_shape


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of pieces; of vectors, elements are rows.

    Args:
        pieces: whose rows, one after another, are the stored ones.
        order: of the stored rows.
        transposed: whether the rows, in their order, are the columns of what is meant.
        undo: what is to be done to the values.
    """

    pieces: tuple[Piece, ...]
    order: Order | None = None
    transposed: bool = False
    undo: Undo | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """With the rows, in their order, first."""
        first = self.pieces[0].shape
        return (sum(piece.shape[0] for piece in self.pieces), *first[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is meant."""
        return swapped(self.row_shape) if self.transposed else self.row_shape

    def rows(self) -> Ids:
        """The stored rows in their order."""
        count = sum(piece.shape[0] for piece in self.pieces)
        return np.arange(count) if self.order is None else self.order(count)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor: one matrix, or several that are ``stacked`` along a dimension before their own."""

    matrices: tuple[Matrix, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        shape = self.matrices[0].shape
        return (len(self.matrices), *shape) if self.stacked else shape


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With the last two dimensions in each other's place."""
    return (*shape[:-2], shape[-1], shape[-2])


def halves_apart(heads: int) -> Order:
    """Undoes rows of heads that were put side by side in pairs, which were half a head apart."""

    def order(rows: int) -> Ids:
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    return order


def head_by_head(kinds: int, heads: int) -> Order:
    """Undoes rows of ``kinds`` of heads that were sorted by kind, and had been by head."""

    def order(rows: int) -> Ids:
        return np.arange(rows).reshape(kinds, heads, -1).swapaxes(0, 1).ravel()

    return order


def in_turn(kinds: int) -> Order:
    """Undoes rows that were sorted by kind, and had come in turn."""

    def order(rows: int) -> Ids:
        return np.arange(rows).reshape(kinds, -1).T.ravel()

    return order
