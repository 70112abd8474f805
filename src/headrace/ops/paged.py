"""Paged KV as the attention operations see it: planes of pages, rows, attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
class StepShape:
    """The rows of a step: each has queries at consecutive slots after its past.

    Args:
        lengths: queries of each row, ``[R]``, at least 1.
        past: slots before them, ``[R]``.
        tables: page tables, ``[R, pages]``; wide enough for the longest context.
    """

    lengths: npt.NDArray[np.int64]
    past: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int32]

    def pages(self, row: int, slots: int, plane: PagedPlane) -> npt.NDArray[np.int64]:
        """Rows of the plane's ``blocks`` that hold the first ``slots`` slots of a row."""
        count = -(-slots // plane.block_size)
        return self.tables[row, :count].astype(np.int64) * plane.stride

    def slots(self, plane: PagedPlane) -> npt.NDArray[np.int64]:
        """``[T]``: where in the plane's ``slots`` the step's keys and values go."""
        ends = np.cumsum(self.lengths)
        slot = np.arange(ends[-1]) + np.repeat(self.past + self.lengths - ends, self.lengths)
        page, offset = np.divmod(slot, plane.block_size)
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        blocks = self.tables[owner, page].astype(np.int64) * plane.stride
        return blocks * plane.block_size + offset


class Attention(ABC, Generic[Plan]):
    """Paged attention: ``plan`` once per step and cache group, ``attend`` once per layer."""

    @abstractmethod
    def plan(self, shape: StepShape, plane: PagedPlane) -> Plan:
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
