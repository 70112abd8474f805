"""The arena: where planes lie, what moves with a page."""

from __future__ import annotations

import itertools

import pytest
import torch

from headrace.contracts.cache import CacheGroup, CacheLayout, PlaneSpec, attention_layout
from headrace.kv.arena import KVArena
from headrace.ops.device import DTYPES

BLOCK, PAGES = 3, 7


def layout(
    groups: int = 1, layers: int = 2, heads: int = 2, width: int = 5, dtype: str = "float32"
) -> CacheLayout:
    """``groups`` groups of ``layers`` layers each."""
    planes = tuple(PlaneSpec(name, "slot", heads, width, dtype) for name in ("key", "value"))
    return CacheLayout(
        BLOCK,
        tuple(
            CacheGroup(tuple(range(first, first + layers)), (planes,) * layers)
            for first in range(0, groups * layers, layers)
        ),
    )


def rows_of(arena: KVArena, group: int, page: int) -> torch.Tensor:
    """Where a page's slots are in a group's planes."""
    plane = arena.group_plane(group)
    return page * plane.stride * BLOCK + torch.arange(BLOCK)


def every_plane(arena: KVArena, group: int) -> list[tuple[int, str]]:
    layers = arena.layout.groups[group].layers
    return list(itertools.product(layers, ("key", "value")))


def write(arena: KVArena, group: int, page: int) -> dict[tuple[int, str], torch.Tensor]:
    """Fill a page with numbers that are found nowhere else; returns them by plane."""
    written = {}
    for number, (layer, name) in enumerate(every_plane(arena, group)):
        plane = arena.plane(layer, name)
        count = BLOCK * plane.heads * plane.width
        first = (page * len(every_plane(arena, group)) + number) * count + 1
        entries = torch.arange(first, first + count).view(BLOCK, plane.heads, plane.width)
        entries = entries.to(arena.pages.dtype)
        plane.write(rows_of(arena, group, page), entries)
        written[layer, name] = entries
    return written


def read(arena: KVArena, group: int, page: int) -> dict[tuple[int, str], torch.Tensor]:
    """What a page holds, through ``gather``."""
    pages = torch.tensor([page]) * arena.group_plane(group).stride
    return {
        (layer, name): arena.plane(layer, name).gather(pages)
        for layer, name in every_plane(arena, group)
    }


def assert_holds(
    arena: KVArena, group: int, page: int, expected: dict[tuple[int, str], torch.Tensor]
) -> None:
    found = read(arena, group, page)
    assert found.keys() == expected.keys()
    for place, entries in expected.items():
        assert torch.equal(found[place], entries), place


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_planes_share_no_byte_and_leave_none(groups: int) -> None:
    arena = KVArena(layout(groups), PAGES, "cpu")
    arena.pages.fill_(-1)
    owners = [page % groups for page in range(PAGES)]
    written = [write(arena, group, page) for page, group in enumerate(owners)]
    for page, group in enumerate(owners):
        assert_holds(arena, group, page, written[page])
    everything = arena.pages.flatten().tolist()
    assert sorted(everything) == list(range(1, len(everything) + 1))


def test_a_page_serves_any_group() -> None:
    arena = KVArena(layout(groups=3), PAGES, "cpu")
    for page, group in itertools.product(range(PAGES), range(3)):
        kept = {other: read(arena, 0, other) for other in range(PAGES) if other != page}
        assert_holds(arena, group, page, write(arena, group, page))
        for other, entries in kept.items():
            torch.testing.assert_close(read(arena, 0, other), entries, equal_nan=True)


def test_gather_follows_the_order_of_pages() -> None:
    arena = KVArena(layout(), PAGES, "cpu")
    written = [write(arena, 0, page) for page in range(PAGES)]
    order = [4, 0, 6, 6, 1]
    plane = arena.plane(1, "value")
    found = plane.gather(torch.tensor(order) * plane.stride)
    assert torch.equal(found, torch.cat([written[page][1, "value"] for page in order]))


def test_single_slots_are_written() -> None:
    arena = KVArena(layout(), PAGES, "cpu")
    arena.pages.zero_()
    plane = arena.plane(0, "key")
    entries = torch.randn(2, plane.heads, plane.width)
    plane.write(torch.stack((rows_of(arena, 0, 5)[2], rows_of(arena, 0, 2)[0])), entries)
    assert torch.equal(read(arena, 0, 5)[0, "key"][2], entries[0])
    assert torch.equal(read(arena, 0, 2)[0, "key"][0], entries[1])
    assert (arena.pages != 0).sum() == entries.numel()


@pytest.mark.parametrize("groups", [1, 2])
def test_copies_move_whole_pages(groups: int) -> None:
    arena = KVArena(layout(groups), PAGES, "cpu")
    written = [write(arena, page % groups, page) for page in range(PAGES)]
    arena.copy_pages([(0, 4), (0, 6), (3, 1)])
    for source, target in ((0, 4), (0, 6), (3, 1), (0, 0), (2, 2), (3, 3), (5, 5)):
        assert_holds(arena, source % groups, target, written[source])


def test_blanking_touches_nothing_else() -> None:
    arena = KVArena(layout(), PAGES, "cpu")
    arena.pages.fill_(torch.nan)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_sizes(dtype: str, groups: int) -> None:
    made = layout(groups, layers=2, heads=2, width=5, dtype=dtype)
    arena = KVArena(made, PAGES, "cpu")
    itemsize = DTYPES[dtype].itemsize
    assert arena.pages.dtype == DTYPES[dtype]
    assert made.page_bytes == BLOCK * 2 * 2 * 2 * 5 * itemsize
    assert made.token_bytes == groups * made.page_bytes / BLOCK
    assert arena.num_bytes == PAGES * made.page_bytes
    assert [made.pages_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_groups_of_layers() -> None:
    arena = KVArena(layout(groups=2, layers=3), PAGES, "cpu")
    assert [arena.group_of(layer) for layer in range(6)] == [0, 0, 0, 1, 1, 1]
    assert attention_layout(
        layers=6, kv_heads=2, head_dim=5, dtype="float32", block_size=BLOCK
    ) == layout(layers=6)


def test_unequal_groups_are_refused() -> None:
    plane = PlaneSpec("key", "slot", 1, 4, "float32")
    one, two = CacheGroup((0,), ((plane,),)), CacheGroup((1,), ((plane, plane),))
    with pytest.raises(ValueError, match="pages of one size"):
        CacheLayout(BLOCK, (one, two))


@pytest.mark.parametrize(
    "other",
    [PlaneSpec("value", "slot", 1, 8, "float32"), PlaneSpec("value", "slot", 2, 4, "bfloat16")],
)
def test_unequal_planes_are_refused(other: PlaneSpec) -> None:
    mixed = CacheLayout(
        BLOCK, (CacheGroup((0,), ((PlaneSpec("key", "slot", 1, 4, "float32"), other),)),)
    )
    with pytest.raises(ValueError, match="equally large"):
        KVArena(mixed, PAGES, "cpu")
