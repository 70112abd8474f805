"""The arena: where planes lie, what moves with a page."""

from __future__ import annotations

import itertools

import pytest
import torch

from headrace.contracts.cache import (
    ALIGNMENT,
    CacheGroup,
    CacheLayout,
    LayerState,
    PlaneSpec,
    attention_layout,
    attention_state,
    layout_of,
)
from headrace.kv.arena import KVArena
from headrace.ops.device import DTYPES
from headrace.ops.paged import PagedPlane, quantize_entries

BLOCK, PAGES = 3, 7


def layout(
    groups: int = 1, layers: int = 2, heads: int = 2, width: int = 5, dtype: str = "float32"
) -> CacheLayout:
    """``groups`` groups of ``layers`` layers each."""
    whole = attention_layout(
        layers=groups * layers, kv_heads=heads, head_dim=width, dtype=dtype, block_size=BLOCK
    )
    (group,) = whole.groups
    return CacheLayout(
        BLOCK,
        tuple(
            CacheGroup(tuple(range(first, first + layers)), group.planes[:layers])
            for first in range(0, groups * layers, layers)
        ),
    )


Place = tuple[int, str, int]
"""Layer, plane, head."""


def places(arena: KVArena, group: int) -> list[Place]:
    made = arena.layout.groups[group]
    return [
        (layer, spec.name, head)
        for layer, specs in zip(made.layers, made.planes, strict=True)
        for spec in specs
        for head in range(spec.heads)
    ]


def write(arena: KVArena, group: int, page: int) -> dict[Place, torch.Tensor]:
    """Fill a page's strips with numbers that are found nowhere else; returns them by place."""
    written = {}
    number = page * len(places(arena, group))
    for layer, name, head in places(arena, group):
        strip = arena.plane(layer, name).strips[head][page]
        first = number * strip.numel() + 1
        written[layer, name, head] = torch.arange(first, first + strip.numel()).view(strip.shape)
        strip.copy_(written[layer, name, head])
        number += 1
    return written


def read(arena: KVArena, group: int, page: int) -> dict[Place, torch.Tensor]:
    """What a page holds."""
    return {
        (layer, name, head): arena.plane(layer, name).read(head, torch.tensor([page]))
        for layer, name, head in places(arena, group)
    }


def assert_holds(
    arena: KVArena, group: int, page: int, expected: dict[Place, torch.Tensor]
) -> None:
    found = read(arena, group, page)
    assert found.keys() == expected.keys()
    for place, entries in expected.items():
        assert torch.equal(found[place], entries.float()), place


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_planes_share_no_byte_and_leave_none(groups: int) -> None:
    arena = KVArena(layout(groups, width=32), PAGES, "cpu")
    arena.pages.fill_(255)
    owners = [page % groups for page in range(PAGES)]
    written = [write(arena, group, page) for page, group in enumerate(owners)]
    for page, group in enumerate(owners):
        assert_holds(arena, group, page, written[page])
    everything = arena.pages.view(torch.float32).flatten().tolist()
    assert sorted(everything) == list(range(1, len(everything) + 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_everything_begins_at_a_cache_line(dtype: str) -> None:
    arena = KVArena(layout(2, dtype=dtype), PAGES, "cpu")
    assert arena.pages.data_ptr() % ALIGNMENT == arena.layout.page_bytes % ALIGNMENT == 0
    ends = {0: 0, 1: 0}
    for group in (0, 1):
        for layer, name, head in places(arena, group):
            plane = arena.plane(layer, name)
            if head == 0:
                assert plane.offsets[0] % ALIGNMENT == 0
            assert ends[group] <= plane.offsets[head]
            ends[group] = plane.offsets[head] + plane.strip_bytes
    assert all(end <= arena.layout.page_bytes < end + ALIGNMENT for end in ends.values())


def test_heads_lie_one_after_another() -> None:
    arena = KVArena(layout(heads=3), PAGES, "cpu")
    write(arena, 0, 4)
    plane = arena.plane(1, "value")
    for head in range(3):
        assert torch.equal(plane.joined()[4, head], plane.strips[head][4])
    first, second, third = plane.offsets
    apart = PagedPlane(arena.pages, (first, third, second), BLOCK, 5, torch.float32)
    assert torch.equal(apart.strips[1][4], plane.strips[2][4])
    with pytest.raises(ValueError, match="one after another"):
        apart.joined()


def test_a_page_serves_any_group() -> None:
    arena = KVArena(layout(groups=3), PAGES, "cpu")
    for page, group in itertools.product(range(PAGES), range(3)):
        kept = {other: read(arena, 0, other) for other in range(PAGES) if other != page}
        assert_holds(arena, group, page, write(arena, group, page))
        for other, entries in kept.items():
            torch.testing.assert_close(read(arena, 0, other), entries, equal_nan=True)


def test_reading_follows_the_order_of_pages() -> None:
    arena = KVArena(layout(), PAGES, "cpu")
    written = [write(arena, 0, page) for page in range(PAGES)]
    order = [4, 0, 6, 6, 1]
    found = arena.plane(1, "value").read(1, torch.tensor(order))
    expected = torch.cat([written[page][1, "value", 1] for page in order])
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_single_slots_are_written(dtype: str) -> None:
    arena = KVArena(layout(dtype=dtype), PAGES, "cpu")
    arena.pages.zero_()
    plane = arena.plane(0, "key")
    entries = torch.randn(2, plane.width).to(plane.dtype)
    plane.write(1, torch.tensor([5, 2]), torch.tensor([2, 0]), entries)
    assert torch.equal(plane.strips[1][5, 2], entries[0])
    assert torch.equal(plane.strips[1][2, 0], entries[1])
    assert (arena.pages.view(plane.dtype) != 0).sum() == entries.numel()


class TestInt8:
    """Entries come back rounded to 127 steps of their largest magnitude."""

    def test_a_layer_has_scales(self) -> None:
        cache = KVArena(layout(dtype="int8"), PAGES, "cpu").cache(1)
        for plane in (cache.keys, cache.values):
            assert plane.dtype == torch.int8 and plane.scales is not None
            assert (plane.scales.dtype, plane.scales.width) == (torch.float32, 1)
        assert KVArena(layout(), PAGES, "cpu").cache(1).keys.scales is None

    def test_written_and_read(self) -> None:
        plane = KVArena(layout(dtype="int8"), PAGES, "cpu").cache(0).values
        torch.manual_seed(0)
        entries = torch.randn(BLOCK, plane.width) * torch.tensor([[1e-3], [1.0], [1e4]])
        plane.write(1, torch.full((BLOCK,), 6), torch.arange(BLOCK), entries)
        error = (plane.read(1, torch.tensor([6])) - entries).abs()
        step = entries.abs().amax(dim=1, keepdim=True) / 127
        assert (error <= step * 0.5001).all()
        assert (error.amax(dim=1, keepdim=True) > step * 0.05).all(), "nothing was rounded"

    def test_rounding(self) -> None:
        """To nearest even; the largest magnitude is kept."""
        entries = torch.tensor([[0.5, 1.5, -2.5, 127.0], [0.0, 0.0, 0.0, 0.0]])
        rounded, scales = quantize_entries(entries)
        assert rounded.tolist() == [[0, 2, -2, 127], [0, 0, 0, 0]]
        assert scales[0] == 1.0
        assert not (rounded * scales)[1].any()

    def test_nan_is_not_lost(self) -> None:
        rounded, scales = quantize_entries(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
        assert torch.equal((rounded * scales).isnan().all(dim=1), torch.tensor([True, False]))


@pytest.mark.parametrize("groups", [1, 2])
def test_copies_move_whole_pages(groups: int) -> None:
    arena = KVArena(layout(groups), PAGES, "cpu")
    written = [write(arena, page % groups, page) for page in range(PAGES)]
    arena.copy_pages([(0, 4), (0, 6), (3, 1)])
    for source, target in ((0, 4), (0, 6), (3, 1), (0, 0), (2, 2), (3, 3), (5, 5)):
        assert_holds(arena, source % groups, target, written[source])


def test_blanking_touches_nothing_else() -> None:
    arena = KVArena(layout(), PAGES, "cpu")
    arena.pages.fill_(255)
    written = [write(arena, 0, page) for page in range(PAGES)]
    arena.blank_pages([2, 5])
    for page in range(PAGES):
        if page in (2, 5):
            assert not arena.pages[page].any()
        else:
            assert_holds(arena, 0, page, written[page])


def test_no_work_is_no_work() -> None:
    arena = KVArena(layout(), PAGES, "cpu")
    arena.pages.fill_(7)
    arena.copy_pages([])
    arena.blank_pages([])
    assert (arena.pages == 7).all()


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
@pytest.mark.parametrize("groups", [1, 2])
def test_sizes(dtype: str, groups: int) -> None:
    made = layout(groups, layers=2, heads=2, width=40, dtype=dtype)
    arena = KVArena(made, PAGES, "cpu")
    # Each plane to the next multiple of 64.
    plane = {"float32": 960, "bfloat16": 512, "float16": 512, "int8": 256 + 64}[dtype]
    assert arena.pages.dtype == torch.uint8
    assert made.page_bytes == 2 * 2 * plane
    assert made.token_bytes == groups * made.page_bytes / BLOCK
    assert arena.num_bytes == PAGES * made.page_bytes
    assert [made.pages_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_groups_of_layers() -> None:
    arena = KVArena(layout(groups=2, layers=3), PAGES, "cpu")
    assert [arena.group_of(layer) for layer in range(6)] == [0, 0, 0, 1, 1, 1]
    assert attention_layout(
        layers=6, kv_heads=2, head_dim=5, dtype="float32", block_size=BLOCK
    ) == layout(layers=6)


def test_groups_have_pages_of_the_largest_size() -> None:
    plane = PlaneSpec("key", "slot", 1, 4, "float32")
    one, two = CacheGroup((0,), ((plane,),)), CacheGroup((1,), ((plane, plane),))
    assert CacheLayout(BLOCK, (one, two)).page_bytes == 2 * plane.page_bytes(BLOCK)


def test_planes_may_differ() -> None:
    """In size and type, as of a layer that keeps something else beside its keys."""
    specs = (
        PlaneSpec("key", "slot", 1, 4, "float32"),
        PlaneSpec("value", "slot", 2, 8, "bfloat16"),
    )
    arena = KVArena(CacheLayout(BLOCK, (CacheGroup((0,), (specs,)),)), PAGES, "cpu")
    assert_holds(arena, 0, 0, write(arena, 0, 0))


class TestStates:
    """What a layer keeps for whole sequences: an entry for each table row, outside the pages."""

    ROWS = 4

    @pytest.fixture
    def arena(self) -> KVArena:
        planes = (
            PlaneSpec("short", "sequence", 2, 3, "float32"),
            PlaneSpec("long", "sequence", 1, 5, "bfloat16"),
        )
        whole = layout_of([attention_state(1, 4, "float32"), LayerState(planes)], BLOCK)
        return KVArena(whole, PAGES, "cpu", self.ROWS)

    def test_planes(self, arena: KVArena) -> None:
        states = arena.states(1)
        assert {name: (tuple(s.shape), s.dtype) for name, s in states.items()} == {
            "short": ((self.ROWS, 2, 3), torch.float32),
            "long": ((self.ROWS, 1, 5), torch.bfloat16),
        }
        assert not any(bool(state.any()) for state in states.values())
        assert arena.num_bytes == PAGES * arena.layout.page_bytes

    def test_copies_come_one_after_another(self, arena: KVArena) -> None:
        for state in arena.states(1).values():
            for row in range(self.ROWS):
                state[row] = row
        arena.copy_states([(0, 1), (1, 2)])
        for state in arena.states(1).values():
            assert state.amax(dim=(1, 2)).tolist() == [0, 0, 0, 3]

    def test_rows_begin_anew(self, arena: KVArena) -> None:
        for state in arena.states(1).values():
            state.fill_(torch.nan)
        arena.clear_states([2, 0])
        arena.clear_states([])
        for state in arena.states(1).values():
            assert state.isnan().any(dim=(1, 2)).tolist() == [False, True, False, True]
