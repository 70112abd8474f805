"""Coded units of keys and values: which rows have them, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.contracts.kv_codec import CodedUnit, KVCodec
from headrace.contracts.step import CodedContext, PageTables, PlanRow
from headrace.kv.arena import KVArena
from headrace.ops.coded_attention import CodedRows, part_bytes


def coded_rows(rows: Sequence[PlanRow], groups: int) -> list[list[CodedRows]]:
    """The rows that have units, by codec, for each of so many cache groups."""
    found: list[dict[KVCodec, CodedRows]] = [{} for _ in range(groups)]
    start = 0
    for row in rows:
        count = len(row.input_ids)
        if row.coded is not None:
            for codecs, unit, pages in zip(found, row.coded.units, row.coded.pages, strict=True):
                if len(pages):
                    made = CodedRows(row.coded.codec, unit, [], [], [])
                    same = codecs.setdefault(row.coded.codec, made)
                    same.starts.append(start)
                    same.queries.append(count)
                    same.pages.append(pages)
        start += count
    return [list(codecs.values()) for codecs in found]


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
    arena: KVArena, codec: KVCodec, unit: CodedUnit, pages: torch.Tensor, fill: Sequence[int]
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
            target[place.offset : place.offset + part_bytes(place.part)] = held
