"""Paged KV as the attention operations see it: planes of pages, rows, attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Plan = TypeVar("Plan")

Indices = npt.NDArray[np.int64]

INT8_LEVELS = 127
SMALLEST_RANGE = 1e-30
"""Entries whose largest magnitude is below this are stored as zeros."""


@dataclass(slots=True, eq=False)
class PagedPlane:
    """One plane (keys, say) of one layer, spread over the pages of the arena.

    In a page, each head has a strip ``[block_size, width]`` of its own.

    Args:
        pages: the arena, ``[pages, page_bytes]`` uint8.
        offsets: bytes from the beginning of a page to the strip of each head.
        width: of one entry; ``dtype``: of its elements.
        scales: for int8, the plane of fp32 scales, one per entry.
    """

    pages: Tensor
    offsets: tuple[int, ...]
    block_size: int
    width: int
    dtype: torch.dtype
    scales: PagedPlane | None = None
    strips: tuple[Tensor, ...] = field(init=False)
    _joined: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.strips = tuple(self._view(offset, 1)[:, 0] for offset in self.offsets)
        first, size = self.offsets[0], self.strip_bytes
        regular = self.offsets == tuple(first + head * size for head in range(self.heads))
        self._joined = self._view(first, self.heads) if regular else None

    def _view(self, offset: int, heads: int) -> Tensor:
        """``[pages, heads, block_size, width]``: strips that follow each other."""
        size = heads * self.strip_bytes
        part = self.pages[:, offset : offset + size].view(self.dtype)
        return part.view(len(self.pages), heads, self.block_size, self.width)

    @property
    def heads(self) -> int:
        """KV heads of the layer."""
        return len(self.offsets)

    @property
    def strip_bytes(self) -> int:
        """Bytes of the strip of one head in one page."""
        return self.block_size * self.width * self.dtype.itemsize

    def joined(self) -> Tensor:
        """All heads as one view, ``[pages, heads, block_size, width]``.

        Raises:
            ValueError: the strips of the heads do not follow each other.
        """
        if self._joined is None:
            raise ValueError("the heads of a plane do not lie one after another")
        return self._joined

    def write(self, head: int, pages: Tensor, slots: Tensor, entries: Tensor) -> None:
        """Store ``entries`` ``[T, width]`` of a head at ``slots`` ``[T]`` of ``pages`` ``[T]``."""
        if self.scales is not None:
            entries, scales = quantize_entries(entries)
            self.scales.strips[head][pages, slots] = scales
        self.strips[head][pages, slots] = entries

    def move(self, source: Tensor, kept: Tensor, target: Tensor) -> None:
        """Copy the slots ``kept`` ``[heads, n]`` of ``source`` pages to fill ``target`` pages."""
        for strip, slots in zip(self.strips, kept, strict=True):
            entries = strip[source[slots // self.block_size], slots % self.block_size]
            strip[target] = entries.view(len(target), self.block_size, self.width)

    def read(self, head: int, pages: Tensor) -> Tensor:
        """Entries of a head in ``pages``, in order: fp32 ``[len(pages) * block_size, width]``."""
        entries = self.strips[head][pages].float()
        if self.scales is not None:
            entries *= self.scales.strips[head][pages]
        return entries.view(-1, self.width)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LayerCache:
    """The planes of one layer that attention writes and reads; one may be both."""

    keys: PagedPlane
    values: PagedPlane


def quantize_entries(entries: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., width]`` as int8, and a scale for each entry, fp32 ``[..., 1]``.

    Symmetric: the scale is the largest magnitude / 127, products with its inverse are rounded to
    nearest even.
    An entry that holds NaN gets the scale NaN.
    """
    wide = entries.float()
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_RANGE)
    factor = largest.reciprocal() * INT8_LEVELS
    return (wide * factor).round().to(torch.int8), largest / INT8_LEVELS


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer wants of attention.

    Args:
        scale: factor of the scores.
        window: a query sees only the last so many slots, its own included; ``None``: all.
        softcap: scores are ``softcap * tanh(scaled / softcap)`` (Gemma 2, section 2).
        causal: queries see nothing behind themselves; else a row sees all of its slots, and must
            come in one step.
        value_width: values are the first so many elements of the keys, whose plane is both
            (DeepSeek-V2, section 2.1); ``None``: they have a plane of their own.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    value_width: int | None = None


@dataclass(frozen=True, slots=True)
class StepShape:
    """The rows of a step: each has queries at consecutive slots after its past.

    The KV heads of a layer may be in groups, each with page tables of its own, and with as many
    slots of a row as are left in it.

    Args:
        lengths: queries of each row, ``[R]``, at least 1.
        past: slots before them in each group, ``[G, R]``.
        tables: page tables, ``[G, R, pages]``; wide enough for the longest context.
        head_group: the group of each KV head, ``[kv_heads]``.
    """

    lengths: Indices
    past: Indices
    tables: npt.NDArray[np.int32]
    head_group: Indices

    @classmethod
    def of_one_group(
        cls, lengths: Indices, past: Indices, tables: npt.NDArray[np.int32], kv_heads: int
    ) -> StepShape:
        """All heads share ``past`` ``[R]`` and ``tables`` ``[R, pages]``."""
        return cls(lengths, past[None], tables[None], np.zeros(kv_heads, dtype=np.int64))

    @property
    def contexts(self) -> Indices:
        """Slots that the last query of each row may see, ``[G, R]``."""
        return self.past + self.lengths

    @property
    def score_starts(self) -> Indices:
        """``[G, R]``: where the contexts begin when those of a group are strung together."""
        return np.cumsum(self.contexts, axis=1) - self.contexts

    def pages(self, group: int, row: int, first: int, end: int, block_size: int) -> Indices:
        """The pages that hold slots ``first`` up to ``end`` of a row; they begin ``first``'s."""
        part = self.tables[group, row, first // block_size : -(-end // block_size)]
        return part.astype(np.int64)

    def slots(self, group: int, block_size: int) -> tuple[Indices, Indices]:
        """Page and slot in it, both ``[T]``, where keys and values of the step go."""
        ends = np.cumsum(self.lengths)
        past = np.repeat(self.past[group] + self.lengths - ends, self.lengths)
        page, slot = np.divmod(np.arange(ends[-1]) + past, block_size)
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return self.tables[group, owner, page].astype(np.int64), slot


class Attention(ABC, Generic[Plan]):
    """Paged attention: ``plan`` once per step and cache group, ``attend`` once per layer."""

    def takes(self, cache: LayerCache) -> bool:
        """Whether this version attends to such a cache."""
        return True

    def sums_scores(self, cache: LayerCache) -> bool:
        """Whether ``attend`` takes ``score_sums`` for such a cache."""
        return False

    @abstractmethod
    def plan(self, shape: StepShape, plane: PagedPlane) -> Plan:
        """Arrange the rows of a step; ``plane`` is any plane of keys of the group.

        Raises:
            ValueError: this version does not take heads in several groups.
        """

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        spec: AttentionSpec,
        plan: Plan,
        score_sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k, write k and v to their slots, attend causally to each row's context.

        What is attended to is what the cache holds: int8 entries as they were rounded.

        Args:
            q: ``[T, heads, width]``; k, v: ``[T, kv_heads, width]``: not rotated, rows of a step
                one after another, entries (the last dimension) contiguous, in one dtype. Where
                values are a part of the keys, v is not looked at.
            cos, sin: of each position, ``[T, width / 2]`` in q's dtype; halves are pairs.
            score_sums: receives, in fp32 ``[kv_heads, S]``, the attention that each slot got: its
                probability summed over the row's queries and the query heads of the KV head. A
                head's slots are row after row, from ``score_starts`` of its group; S is the sum
                of the contexts of the group in which it is largest, and what lies behind a
                smaller one is left as it is.

        Returns:
            ``[T, heads, width of values]`` in q's dtype, and the log-sum-exp of the scores,
            ``[T, heads]`` in fp32.

        Raises:
            ValueError: this version does not sum scores.
        """

    @abstractmethod
    def attend_past(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Attend to what was cached before the step, and write nothing.

        Args:
            q: ``[T, heads, width]``: rotated. All queries of a row see all of its past.
            spec: without a window.
            plan: of a step in which every row has a past.

        Returns:
            As ``attend``.

        Raises:
            ValueError: this version always writes.
        """
