"""Weights that checkpoints hold as integers, on their way into the native layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from headrace.ops.block_weight import BlockLayout, BlockParts, BlockWeight, Take, pack_rows


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A weight ``[rows, columns]`` of integers, of which nothing has been read.

    Args:
        layout: in which it has the same values.
        bits_per_weight: of that, scales and zeros included.
        open: makes its rows available.
        transposed: whether the tensor that was asked for has these rows as its columns.
        order: int64 ``[columns]``: for each column of the rows, the weight's column that it is;
            ``None``: they are in order.
    """

    layout: BlockLayout
    bits_per_weight: float
    rows: int
    columns: int
    open: Callable[[], Take]
    transposed: bool = False
    order: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes in the native layout, apart from rows that fill a panel."""
        return int(self.rows * self.layout.padded_columns(self.columns) * self.bits_per_weight / 8)

    @property
    def key(self) -> object:
        """Equal for weights whose rows can make one product."""
        order = None if self.order is None else self.order.numpy().tobytes()
        return self.layout, order


@dataclass(frozen=True, slots=True)
class Piece:
    """Successive weights of a stack that are made ready as one.

    Args:
        first, end: their places in the stack.
        blocks: them in integers, all of one key; empty if they are to be read as numbers.
    """

    first: int
    end: int
    blocks: tuple[StoredBlocks, ...]


def split_stack(stored: Sequence[StoredBlocks | None]) -> list[Piece]:
    """Pieces of a stack, given what each of its weights is stored as."""
    pieces, first = [], 0
    for _, group in groupby(stored, key=lambda one: None if one is None else one.key):
        blocks = tuple(group)
        end = first + len(blocks)
        pieces.append(Piece(first, end, tuple(one for one in blocks if one is not None)))
        first = end
    return pieces


def pack_stored(
    blocks: Sequence[StoredBlocks], gated: bool = False, order: Tensor | None = None
) -> BlockWeight:
    """The native layout of weights of one key, one above the other.

    Args:
        order: int64 ``[N]``: for each row of the result, which of all rows it is.
    """
    layout, columns = blocks[0].layout, blocks[0].columns
    takes = [one.open() for one in blocks]
    # Whether a weight has zeros of its own may be known by its values only.
    first = torch.zeros(1, dtype=torch.int64)
    with_zeros = any(take(first).zeros is not None for take in takes)
    ends = torch.tensor([one.rows for one in blocks]).cumsum(0).tolist()

    def chosen(rows: Tensor) -> Iterator[tuple[Tensor, BlockParts]]:
        for take, one, end in zip(takes, blocks, ends, strict=True):
            places = ((rows >= end - one.rows) & (rows < end)).nonzero().flatten()
            if len(places):
                yield places, take(rows[places] - (end - one.rows))

    def take(rows: Tensor) -> BlockParts:
        places, parts = zip(*chosen(rows if order is None else order[rows]), strict=True)
        joined = BlockParts.join(parts, layout, with_zeros)
        if len(parts) == 1:
            return joined
        back = torch.cat(places).argsort()
        return joined.map(lambda x: x[back])

    return pack_rows(take, ends[-1], columns, layout, gated)
