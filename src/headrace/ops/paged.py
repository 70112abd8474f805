"""Paged KV as the attention operations see it: planes of pages, rows, attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

Plan = TypeVar("Plan")


@dataclass(slots=True)
class PagedPlane:
    """One plane (keys, say) of one layer, spread over the pages of the arena.

    Args:
        blocks: ``[pages * stride, block_size * heads * width]``: a view of the arena shifted so
            that the plane's part of page ``p`` is row ``p * stride``.
        slots: the same memory as ``[pages * stride * block_size, heads * width]``: slot ``s`` of
            page ``p`` is row ``p * stride * block_size + s``.
        stride: blocks of one page.
    """

    blocks: Tensor
    slots: Tensor
    stride: int
    block_size: int
    heads: int
    width: int

    def write(self, slots: Tensor, entries: Tensor) -> None:
        """Store ``entries`` ``[T, heads, width]`` at rows ``slots`` ``[T]``."""
        self.slots.index_copy_(0, slots, entries.reshape(len(slots), -1))

    def gather(self, pages: Tensor) -> Tensor:
        """A copy of the pages' slots in order, ``[len(pages) * block_size, heads, width]``.

        ``pages`` holds rows of ``blocks``.
        """
        return self.blocks.index_select(0, pages).view(-1, self.heads, self.width)


@dataclass(frozen=True, slots=True)
class RowShape:
    """One row of a step: ``length`` queries after ``past`` slots, and its page table."""

    length: int
    past: int
    table: npt.NDArray[np.int32]

    def pages(self, slots: int, plane: PagedPlane) -> npt.NDArray[np.int64]:
        """Rows of the plane's ``blocks`` that hold the first ``slots`` slots."""
        count = -(-slots // plane.block_size)
        return self.table[:count].astype(np.int64) * plane.stride


def slot_rows(rows: Sequence[RowShape], plane: PagedPlane) -> npt.NDArray[np.int64]:
    """``[T]``: where in the plane's ``slots`` the step's keys and values go."""
    lengths = np.array([row.length for row in rows])
    starts = np.array([row.past for row in rows]) - (np.cumsum(lengths) - lengths)
    slot = np.arange(lengths.sum()) + np.repeat(starts, lengths)
    owner = np.repeat(np.arange(len(rows)), lengths)
    page, offset = np.divmod(slot, plane.block_size)
    tables = np.zeros((len(rows), int(page.max()) + 1), dtype=np.int64)
    for index, row in enumerate(rows):
        used = min(tables.shape[1], len(row.table))
        tables[index, :used] = row.table[:used]
    slots: npt.NDArray[np.int64] = tables[owner, page] * plane.stride * plane.block_size + offset
    return slots


class Attention(ABC, Generic[Plan]):
    """Paged attention: ``plan`` once per step and cache group, ``attend`` once per layer."""

    @abstractmethod
    def plan(self, rows: Sequence[RowShape], plane: PagedPlane) -> Plan:
        """Arrange the rows of a step; ``plane`` is any plane of the group."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: PagedPlane,
        values: PagedPlane,
        scale: float,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        """Write ``k`` and ``v`` to their slots, then attend causally to each row's context.

        Args:
            q: ``[T, heads, width]``; k, v: ``[T, kv_heads, width]``; q and k are rotated.
            keys, values: the layer's planes.
            scale: factor of the scores.

        Returns:
            ``[T, heads, width]`` in q's dtype, and the log-sum-exp of the scaled scores,
            ``[T, heads]`` in fp32.
        """
