"""Segments: parts of a row's context that it only reads, merged with what it sees of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.contracts.step import PageTables, PlanRow
from headrace.kv.arena import KVArena
from headrace.ops.paged import Attention, AttentionSpec, Indices, LayerCache, StepShape
from headrace.ops.reference import merge_parts, rotate


@dataclass(frozen=True, slots=True)
class SegmentReads:
    """What the inputs of a micro-batch read beside the own context of their rows.

    Each segment is read once, by all inputs that see it: a read is of one by one input.

    Args:
        readers: int64 ``[n]``: the inputs that read segments.
        owners: int64 ``[N]``: of each read, which of the readers it is for; those of a segment
            follow each other.
        positions: int64 ``[N]``: where the reader stands as seen from the segment's keys.
        plans: of attention to the segments, one per cache group.
    """

    readers: Tensor
    owners: Tensor
    positions: Tensor
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
        turned = rotate(q[self.readers[self.owners]], *angles)
        parts = attention.attend_past(turned, cache, spec, self.plans[group])
        out, lse = own
        merged = merge_parts(out[self.readers], lse[self.readers], *parts, self.owners)
        out[self.readers], lse[self.readers] = merged[0].to(out.dtype), merged[1]
        return own


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
    reads: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    place = 0
    for row in rows:
        for offset, position in enumerate(row.positions if row.segments else ()):
            for each in row.segments:
                part = (each.table_row, each.begin, each.length)
                reads.setdefault(part, []).append((len(readers), position + each.shift))
            readers.append(place + offset)
        place += len(row.input_ids)

    def tensor(values: list[int]) -> Tensor:
        array = np.array(values, dtype=np.int64)
        return torch.from_numpy(array).to(device, non_blocking=True)

    counts = np.array([len(found) for found in reads.values()])
    return SegmentReads(
        tensor(readers),
        tensor([reader for found in reads.values() for reader, _ in found]),
        tensor([position for found in reads.values() for _, position in found]),
        _plans(list(reads), counts, tables, arena, attention),
    )


def _plans(
    segments: Sequence[tuple[int, int, int]],
    counts: Indices,
    tables: PageTables,
    arena: KVArena,
    attention: Attention[Any],
) -> list[Any]:
    """For each cache group, of a step whose rows are segments with ``counts`` queries each."""
    used = [table_row for table_row, _, _ in segments]
    begins = np.array([begin for _, begin, _ in segments])
    lengths = np.array([length for _, _, length in segments])
    plans = []
    for group in range(len(arena.layout.groups)):
        plane = arena.group_plane(group)
        pages = pages_from(tables[group], used, begins, lengths + counts, plane.block_size)
        shape = StepShape.of_one_group(counts, lengths, pages, plane.heads)
        plans.append(attention.plan(shape, plane))
    return plans


def pages_from(
    table: npt.NDArray[np.int32],
    rows: Sequence[int],
    begins: Indices | None,
    lengths: Indices,
    block_size: int,
) -> npt.NDArray[np.int32]:
    """The pages ``[R, most]`` of ``lengths`` slots from ``begins`` on, of rows of a table.

    Without ``begins``, from the first slot on.
    """
    count = -(-int(lengths.max()) // block_size)
    if begins is None or (not begins.any() and count <= table.shape[1]):
        return table[rows, :count]
    # What lies behind a row's own pages is not read, and may be anything.
    columns = np.minimum(np.arange(count) + begins[:, None] // block_size, table.shape[1] - 1)
    found: npt.NDArray[np.int32] = table[np.array(rows)[:, None], columns]
    return found
