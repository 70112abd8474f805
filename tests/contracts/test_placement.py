"""What a placement takes of memory, and how it splits a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contracts.cache import CacheGroup, CacheLayout, attention_state, layout_of
from headrace.contracts.placement import Placement, PlacementFacts, parse_bytes
from headrace.contracts.step import PlanRow

LAYOUT = layout_of([attention_state(2, 64, "bfloat16", w) for w in (None, 32, None, None)], 16)
PAGE = 2 * 16 * 2 * 64 * 2
"""Bytes of a page that are one layer's."""

FACTS = PlacementFacts(
    fixed_bytes=1000,
    layer_bytes=(10, 20, 40, 80),
    layout=LAYOUT,
    num_pages=100,
    sequences=8,
    sequence_pages=12,
    disk_bandwidth=1e9,
    memory_bandwidth=1e10,
)


def row(slot: int, inputs: int) -> PlanRow:
    return PlanRow(0, 0, [1] * inputs, range(slot, slot + inputs), slot)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("512MiB", 512 << 20), ("1.5KiB", 1536), ("2GiB", 2 << 30), ("1TiB", 1 << 40)],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "MiB", "1.5", "1MB", "nanGiB", "infGiB", "1e9"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="must be bytes, as in 512MiB"):
        parse_bytes(text)


def test_memory() -> None:
    """Layers 0 and 3 of the layout share a group, 1 is alone in its window, 2 is in a third."""
    assert [group.layers for group in LAYOUT.groups] == [(0,), (2,), (3,), (1,)]
    assert LAYOUT.page_bytes == PAGE
    everything = Placement()
    assert not everything.on_disk
    known = 1000 + 150 + 100 * PAGE
    assert FACTS.memory(everything) == known + known // 16
    weights = Placement(streamed=frozenset({0, 2}), slots=2)
    known = 1000 + 20 + 80 + 2 * 40 + 100 * PAGE
    assert FACTS.memory(weights) == known + known // 16
    # Pages of one group are no smaller for what others have on disk.
    some = Placement(spilled=frozenset({0, 1}), block_pages=7)
    assert FACTS.cache_bytes(some) == 100 * PAGE + 2 * 7 * PAGE
    all_of_them = Placement(spilled=frozenset(range(4)), block_pages=7, slots=1)
    assert FACTS.cache_bytes(all_of_them) == 7 * PAGE
    one_group = CacheLayout(16, (CacheGroup((0, 1), LAYOUT.groups[0].planes * 2),))
    halves = replace(FACTS, layout=one_group)
    assert halves.cache_bytes(Placement(spilled=frozenset({1}), block_pages=7)) == 114 * PAGE
    # Buffers are aligned to what a disk reads.
    narrow = layout_of([attention_state(1, 8, "float32")], 4)
    assert (
        replace(FACTS, layout=narrow).cache_bytes(Placement(spilled=frozenset({0}), block_pages=1))
        == 2 * 4096
    )


@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=12),
    rows=st.integers(1, 5),
    pages=st.integers(9, 20),
)
def test_blocks(lengths: list[tuple[int, int]], rows: int, pages: int) -> None:
    """All rows in their order, in blocks as large as they may be and no larger."""
    plan = [row(*each) for each in lengths]
    blocks = list(Placement(block_rows=rows, block_pages=pages).split(plan, LAYOUT))
    assert [each for block in blocks for each in block] == plan
    held = [sum(LAYOUT.pages_for(r.slot + len(r.input_ids)) for r in block) for block in blocks]
    for block, count in zip(blocks, held, strict=True):
        assert len(block) <= rows and count <= pages
    for block, after, count in zip(blocks, blocks[1:], held, strict=False):
        more = LAYOUT.pages_for(after[0].slot + len(after[0].input_ids))
        assert len(block) == rows or count + more > pages
