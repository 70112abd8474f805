"""Which pages of a block are read, and which written back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.contracts.cache import CacheLayout, attention_state, layout_of
from headrace.contracts.step import PlanRow
from headrace.disk import DiskFile
from headrace.kv.tiered_arena import TieredArena, file_bytes, record_bytes, runs, stage

BLOCK = 4
PAGES = 60

Sizes = list[tuple[int, int]]
"""Slots before the step and inputs, of each row."""

sizes = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5)


def deal(rows: Sizes, seed: int) -> tuple[list[PlanRow], np.ndarray]:
    """Rows with pages of their own; the whole pages of the past of the first are everybody's."""
    generator = np.random.default_rng(seed)
    deck = generator.permutation(PAGES).tolist()
    table = np.zeros((len(rows), 10), dtype=np.int32)
    for index, (slot, inputs) in enumerate(rows):
        count = -(-(slot + inputs) // BLOCK)
        table[index, :count] = [deck.pop() for _ in range(count)]
        shared = min(slot, rows[0][0]) // BLOCK
        table[index, :shared] = table[0, :shared]
    plan = [
        PlanRow(i, i, [1] * inputs, range(slot, slot + inputs), slot)
        for i, (slot, inputs) in enumerate(rows)
    ]
    return plan, table


@given(rows=sizes, seed=st.integers(0, 5))
def test_pages_of_a_block(rows: Sizes, seed: int) -> None:
    """Slot by slot: what holds something is read, what is written to is written back."""
    plan, table = deal(rows, seed)
    staged = stage(plan, table, BLOCK)
    held, written = set(), set()
    for index, (slot, inputs) in enumerate(rows):
        held |= {int(table[index, each // BLOCK]) for each in range(slot)}
        written |= {int(table[index, each // BLOCK]) for each in range(slot, slot + inputs)}
    assert staged.pages.tolist() == sorted(held | written)
    assert set(staged.pages[staged.filled].tolist()) == held
    assert set(staged.pages[staged.changed].tolist()) == written
    for places in (staged.filled, staged.changed):
        found = [
            (place + each, page + each)
            for place, page, count in runs(staged, places)
            for each in range(count)
        ]
        assert found == [(place, staged.pages[place]) for place in places.tolist()]
        joined = [(first + count, page + count) for first, page, count in runs(staged, places)]
        assert not set(joined) & {run[:2] for run in runs(staged, places)}, "runs are not joined"


LAYOUTS = {
    "one group": layout_of([attention_state(2, 8, "float32")] * 3, BLOCK),
    "windows": layout_of([attention_state(2, 8, "float32", w) for w in (None, 6, None, 6)], BLOCK),
}


def make_arena(layout: CacheLayout, spilled: set[int], directory: Path, slots: int) -> TieredArena:
    size = file_bytes(layout, PAGES, spilled)
    file = DiskFile.scratch(directory, size)
    file.reserve(size)
    options = {"spilled": spilled, "block_pages": PAGES, "slots": slots}
    return TieredArena(layout, PAGES, 4, file=file, ahead=slots > 1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("spilled", [{0}, {0, 1, 2}, {1, 2}])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_keep_what_was_written(
    layout: CacheLayout, spilled: set[int], slots: int, tmp_path: Path
) -> None:
    """Steps of two blocks write random entries; a copy in plain memory says what is there."""
    arena = make_arena(layout, spilled, tmp_path, slots)
    layers = [layer for group in layout.groups for layer in group.layers]
    plain = torch.zeros(max(layers) + 1, PAGES, 2, BLOCK, 8)
    groups = len(layout.groups)
    deck = list(range(PAGES))
    tables = np.array(
        [[[deck.pop() for _ in range(6)] for _ in range(4)] for _ in range(groups)], dtype=np.int32
    )
    generator = torch.Generator().manual_seed(1)
    arena.pages.zero_()
    for slot in range(0, 20, 3):
        rows = [PlanRow(i, i, [1] * 3, range(slot, slot + 3), slot) for i in range(4)]
        blocks = [rows[:1], rows[1:]]
        seen = [arena.tables_of(number, block, tables) for number, block in enumerate(blocks)]
        arena.begin(len(blocks))
        for layer in sorted(layers):
            group = next(i for i, each in enumerate(layout.groups) if layer in each.layers)
            for number, block in enumerate(blocks):
                arena.enter(layer, number)
                plane = arena.cache(layer).keys.joined()
                for row in block:
                    columns = -(-(slot + 3) // BLOCK)
                    local = seen[number][arena.group_of(layer), row.table_row, :columns].tolist()
                    pages = tables[group, row.table_row, :columns].tolist()
                    assert torch.equal(plane[local], plain[layer, pages])
                    for place in range(slot, slot + 3):
                        entry = torch.randn(2, 8, generator=generator)
                        for target, page in ((plane, local), (plain[layer], pages)):
                            target[page[place // BLOCK], :, place % BLOCK] = entry
                arena.leave(layer, number)
        arena.end()
    arena.close()


def test_copies_are_of_all_layers(tmp_path: Path) -> None:
    arena = make_arena(LAYOUTS["one group"], {0, 2}, tmp_path, 2)
    arena.pages.zero_()
    row = PlanRow(0, 0, [1] * 4, range(4), 0)
    for page, value in ((3, None), (7, 5.0)):
        if value is not None:
            arena.copy_pages([(3, 7)])
        tables = np.full((1, 1, 1), page, dtype=np.int32)
        row = PlanRow(0, 0, [1], range(0 if value is None else 3, 4), 0 if value is None else 3)
        seen = arena.tables_of(0, [row], tables)
        arena.begin(1)
        for layer in range(3):
            arena.enter(layer, 0)
            local = int(seen[arena.group_of(layer), 0, 0])
            entries = arena.cache(layer).keys.joined()[local]
            if value is None:
                entries[:] = 5.0 + layer
            assert (entries == 5.0 + layer).all()
            arena.leave(layer, 0)
        arena.end()
    arena.close()


def test_records_are_aligned() -> None:
    layout = LAYOUTS["one group"]
    assert layout.layer_bytes(0) == 2 * BLOCK * 2 * 8 * 4 < record_bytes(layout, {0}) == 4096
    assert file_bytes(layout, PAGES, {0, 2}) == 2 * PAGES * 4096
    assert file_bytes(LAYOUTS["windows"], PAGES, {0, 1}) == PAGES * 4096
