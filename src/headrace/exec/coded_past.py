"""Coded units of keys and values: attended to, and made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, CodedUnit, KVCodec
from headrace.contracts.step import CodedContext, PageTables, PlanRow
from headrace.kv.arena import KVArena
from headrace.ops.attention import matmul_kernel
from headrace.ops.device import DTYPES
from headrace.ops.paged import AttentionSpec
from headrace.ops.reference import merge_attention

_DTYPES = {**DTYPES, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16}

_SLOTS_AT_ONCE = 4096
"""Slots of a layer that are decoded at once."""


@dataclass(frozen=True, slots=True)
class CodedRow:
    """A row of a micro-batch with coded units before its own slots.

    Args:
        units: how they lie in pages, in each cache group.
        pages: of the units in order, int64 ``[n, pages of a unit]``, in each cache group.
        start, queries: its inputs in the micro-batch.
    """

    codec: KVCodec
    units: Sequence[CodedUnit]
    pages: Sequence[Tensor]
    start: int
    queries: int


def coded_rows(rows: Sequence[PlanRow], device: str) -> list[CodedRow]:
    """The rows that have units, with their places in the micro-batch."""
    found, start = [], 0
    for row in rows:
        count = len(row.input_ids)
        if row.coded is not None and any(map(len, row.coded.pages)):
            pages = [torch.from_numpy(each.astype("int64")).to(device) for each in row.coded.pages]
            found.append(CodedRow(row.coded.codec, row.coded.units, pages, start, count))
        start += count
    return found


def attend_coded(
    arena: KVArena,
    layer: int,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    row: CodedRow,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """Attention of a row to its units, merged with that to its own slots.

    Args:
        q: ``[queries, heads, width]``, rotated.
        own: ``[queries, heads, width]`` and the log-sum-exp ``[queries, heads]``.
    """
    if not len(row.pages[arena.group_of(layer)]):
        return own
    out, lse = own
    query, group = q.transpose(0, 1)[None], arena.group_of(layer)
    for pages in row.pages[group].split(max(1, _SLOTS_AT_ONCE // row.units[group].slots)):
        keys, values = (x.to(q.dtype)[None] for x in read_units(arena, layer, row, pages))
        part, part_lse = matmul_kernel(query, keys, values, spec, None, False)
        out, lse = merge_attention(out, lse, part[0].transpose(0, 1), part_lse[0].T)
    return out, lse


def read_units(arena: KVArena, layer: int, row: CodedRow, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of units ``[n, pages of a unit]``: fp32 ``[heads, n * slots, width]``."""
    parts = {}
    for place in row.units[arena.group_of(layer)].places[layer]:
        end = place.offset + _size(place.part)
        held = arena.pages[pages[:, place.page], place.offset : end]
        shape = (len(pages), *place.part.shape)
        parts[place.part.name] = held.view(_DTYPES[place.part.dtype]).view(shape)
    keys, values = row.codec.decode(parts)
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def fill_unit(arena: KVArena, row: PlanRow, coded: CodedContext, tables: PageTables) -> None:
    """Code the first slots of a row as the units that they fill, in every layer."""
    for group, (unit, fills) in enumerate(zip(coded.units, coded.fills, strict=True)):
        columns = arena.layout.pages_for(unit.slots)
        for number, fill in enumerate(fills):
            first = number * columns
            source = tables[group, row.table_row, first : first + columns].astype("int64")
            pages = torch.from_numpy(source).to(arena.pages.device)
            _fill(arena, coded.codec, unit, pages, fill.tolist())


def _fill(
    arena: KVArena, codec: KVCodec, unit: CodedUnit, pages: Tensor, fill: Sequence[int]
) -> None:
    """Code what a group has in ``pages`` to the pages ``fill``."""
    for layer, places in unit.places.items():
        cache = arena.cache(layer)
        keys, values = (
            torch.stack([plane.read(head, pages) for head in range(plane.heads)])
            for plane in (cache.keys, cache.values)
        )
        parts = codec.encode(keys, values)
        for place in places:
            target = arena.pages[fill[place.page]]
            held = parts[place.part.name].contiguous().view(torch.uint8).flatten()
            target[place.offset : place.offset + _size(place.part)] = held


def _size(part: CodedPart) -> int:
    """Bytes of its tensor."""
    items = 1
    for size in part.shape:
        items *= size
    return items * _DTYPES[part.dtype].itemsize
