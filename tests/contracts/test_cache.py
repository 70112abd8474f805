"""The shape of the KV cache: which layers share pages, and how many a sequence needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.contracts.cache import (
    MOST_GROUPS,
    CacheLayout,
    LayerState,
    PlaneSpec,
    attention_state,
    layout_of,
)

BLOCK = 4
STATE = LayerState((PlaneSpec("state", "sequence", 2, 8, "float32"),))


def layout(*windows: int | None) -> CacheLayout:
    """Of layers with plain keys and values and these windows."""
    return layout_of([attention_state(2, 16, "bfloat16", window) for window in windows], BLOCK)


def test_layers_of_a_window_share_a_group() -> None:
    made = layout(None, None, None)
    assert [group.layers for group in made.groups] == [(0, 1, 2)]
    assert made.page_bytes == 3 * 2 * BLOCK * 2 * 16 * 2
    assert (made.window, made.columns_in_window(8)) == (None, None)


def test_groups_are_of_one_size() -> None:
    """Five layers with a window for one without: as many groups as fill pages of one layer."""
    made = layout(*[20] * 5, None, *[20] * 5, None)
    assert {(group.window, len(group.layers)) for group in made.groups} == {(None, 2), (20, 2)}
    assert sorted(layer for group in made.groups for layer in group.layers) == list(range(12))
    assert len(made.groups) == 6
    assert made.token_bytes == pytest.approx(12 * 2 * 2 * 16 * 2)


@pytest.mark.parametrize("layers", [9, 17, 100])
def test_there_are_few_groups(layers: int) -> None:
    made = layout(None, *[20] * layers)
    assert len(made.groups) <= MOST_GROUPS
    assert sorted(i for group in made.groups for i in group.layers) == list(range(layers + 1))


@pytest.mark.parametrize("stages", [(10, 19), (10, 20, 30), (1, 31), (16,), (3, 5, 9, 14, 20)])
def test_groups_do_not_reach_over_stages(stages: tuple[int, ...]) -> None:
    made = layout_of([attention_state(2, 16, "bfloat16")] * 32, BLOCK, stages)
    for group in made.groups:
        assert {sum(begin <= layer for begin in stages) for layer in group.layers} == {group.stage}
    assert sorted(i for group in made.groups for i in group.layers) == list(range(32))
    assert len(made.groups) <= MOST_GROUPS
    assert made.num_stages == len(stages) + 1
    assert made.token_bytes <= 1.5 * layout(*[None] * 32).token_bytes


def test_pages_are_well_filled() -> None:
    """Stages of 10, 9 and 13 layers: 7 groups of at most 5."""
    made = layout_of([attention_state(2, 16, "bfloat16")] * 32, BLOCK, (10, 19))
    assert sorted(len(group.layers) for group in made.groups) == [4, 4, 4, 5, 5, 5, 5]


def test_windows_of_several_widths() -> None:
    made = layout(8, 20, None)
    assert [group.window for group in made.groups] == [8, 20, None]
    assert made.window == 20


def test_states_lie_outside_the_pages() -> None:
    made = layout_of([STATE, attention_state(2, 16, "bfloat16"), STATE], BLOCK)
    assert [group.layers for group in made.groups] == [(1,)]
    assert [layer for layer, _ in made.states] == [0, 2]
    assert made.state_bytes == 2 * 2 * 8 * 4
    both = LayerState(attention_state(2, 16, "bfloat16").planes + STATE.planes)
    made = layout_of([both], BLOCK)
    assert len(made.groups) == len(made.states) == 1
    assert {plane.name for plane in made.groups[0].planes[0]} == {"key", "value"}


def test_states_of_methods_come_beside_the_models() -> None:
    plane = PlaneSpec("chosen", "sequence", 1, 10, "int32")
    plain = layout_of([STATE] * 3, BLOCK)
    made = replace(plain, method_states=((1, plane),))
    assert made.all_states == (*plain.states, (1, plane))
    assert made.state_bytes == plain.state_bytes + 40


def test_states_alone_need_no_pages() -> None:
    made = layout_of([STATE] * 3, BLOCK)
    assert made.groups == () and made.page_bytes == made.token_bytes == 0
    assert made.pages_to_hold(10**6, 512) == 0


@pytest.mark.parametrize("chunk", [1, 8, 512])
def test_pages_of_a_long_sequence(chunk: int) -> None:
    """Those with a window are as many as a window and a step's inputs take, at any length."""
    made = layout(20, None)
    for slots in range(1, 200, 7):
        columns = -(-slots // BLOCK)
        behind = -(-(20 + chunk) // BLOCK) + 1
        assert made.pages_to_hold(slots, chunk) == columns + min(columns, behind)


def test_planes_begin_at_cache_lines() -> None:
    odd = layout_of([attention_state(1, 3, "int8"), attention_state(1, 3, "int8")], 5)
    assert [plane.name for plane in odd.groups[0].planes[0]] == [
        *("key", "value", "key_scale", "value_scale")
    ]
    assert odd.page_bytes == 2 * 4 * 64
