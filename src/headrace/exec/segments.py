"""Segments: parts of a row's context that it only reads, merged with what it sees of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.contracts.step import PageTables, PlanRow, Segment
from headrace.kv.arena import KVArena
from headrace.ops.paged import Attention, AttentionSpec, Indices, LayerCache, StepShape
from headrace.ops.reference import merge_attention, rotate


@dataclass(frozen=True, slots=True)
class SegmentReads:
    """What the inputs of a micro-batch read beside the own context of their rows.

    Args:
        readers: int64 ``[n]``: the inputs that read segments.
        queries: int64 ``[N]``: the input of each pair of an input and a segment that it reads;
            first the first segments of all readers, then the second ones, and so on.
        positions: int64 ``[N]``: where the input stands as seen from the segment's keys.
        parts: for the first segments, the second ones and so on, their pairs, and which of the
            readers they are for, int64.
        plans: of attention to the pairs, one per cache group.
    """

    readers: Tensor
    queries: Tensor
    positions: Tensor
    parts: Sequence[tuple[slice, Tensor]]
    plans: Sequence[Any]

    def merge(
        self,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        attention: Attention[Any],
        cache: LayerCache,
        spec: AttentionSpec,
        group: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention to the segments, and to the rows' own context, which ``own`` is.

        Args:
            q: ``[T, heads, width]``: not rotated.
            own: output and log-sum-exp of ``Attention.attend``; readers' entries are replaced.
            angles: cosine and sine of ``positions``.
        """
        turned = rotate(q[self.queries], *angles)
        outs, lses = attention.attend_cached(turned, cache, spec, self.plans[group])
        # Rounded once, however many segments there are.
        out, lse = own[0][self.readers].float(), own[1][self.readers]
        for pairs, chosen in self.parts:
            merged = merge_attention(out[chosen], lse[chosen], outs[pairs], lses[pairs])
            out[chosen], lse[chosen] = merged
        own[0][self.readers], own[1][self.readers] = out.to(own[0].dtype), lse
        return own


@dataclass(frozen=True, slots=True)
class _Pair:
    """An input, its place among the readers, and a segment that it reads."""

    place: int
    reader: int
    position: int
    segment: Segment


def read_segments(
    rows: Sequence[PlanRow],
    tables: PageTables,
    arena: KVArena,
    attention: Attention[Any],
    device: str,
) -> SegmentReads | None:
    """What the rows of a micro-batch read, planned once for all layers; ``None``: nothing."""
    if not any(row.segments for row in rows):
        return None
    readers: list[int] = []
    ranks: list[list[_Pair]] = []
    place = 0
    for row in rows:
        for offset, position in enumerate(row.positions if row.segments else ()):
            for rank, segment in enumerate(row.segments):
                if rank == len(ranks):
                    ranks.append([])
                ranks[rank].append(
                    _Pair(place + offset, len(readers), position + segment.shift, segment)
                )
            readers.append(place + offset)
        place += len(row.input_ids)

    def tensor(values: list[int]) -> Tensor:
        array = np.array(values, dtype=np.int64)
        return torch.from_numpy(array).to(device, non_blocking=True)

    pairs = [pair for of_rank in ranks for pair in of_rank]
    parts, start = [], 0
    for of_rank in ranks:
        chosen = tensor([pair.reader for pair in of_rank])
        parts.append((slice(start, start + len(of_rank)), chosen))
        start += len(of_rank)
    return SegmentReads(
        tensor(readers),
        tensor([pair.place for pair in pairs]),
        tensor([pair.position for pair in pairs]),
        parts,
        _plans([pair.segment for pair in pairs], tables, arena, attention),
    )


def _plans(
    segments: Sequence[Segment], tables: PageTables, arena: KVArena, attention: Attention[Any]
) -> list[Any]:
    """For each cache group, of a step in which each segment is the context of one query."""
    lengths = np.array([segment.length for segment in segments])
    used = [segment.table_row for segment in segments]
    begins = np.array([segment.begin for segment in segments])
    plans = []
    for group in range(len(arena.layout.groups)):
        plane = arena.group_plane(group)
        pages = pages_from(tables[group], used, begins, lengths, plane.block_size)
        shape = StepShape.of_one_group(np.ones_like(lengths), lengths - 1, pages, plane.heads)
        plans.append(attention.plan(shape, plane))
    return plans


def pages_from(
    table: npt.NDArray[np.int32],
    rows: Sequence[int],
    begins: Indices,
    lengths: Indices,
    block_size: int,
) -> npt.NDArray[np.int32]:
    """The pages ``[R, most]`` of ``lengths`` slots from ``begins`` on, of rows of a table."""
    count = -(-int(lengths.max()) // block_size)
    if not begins.any():
        return table[rows, :count]
    columns = np.arange(count) + begins[:, None] // block_size
    # Rows that need fewer pages than the longest have anything behind them.
    columns = np.minimum(columns, table.shape[1] - 1)
    found: npt.NDArray[np.int32] = table[np.array(rows)[:, None], columns]
    return found
