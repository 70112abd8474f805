"""The cost model of FlexGen: of all placements that fit, one that takes the least time."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.contracts.cache import attention_state, layout_of
from headrace.contracts.placement import Placement, PlacementFacts
from headrace.exec.placement.flexgen import FlexGen, spread

PAGE = 2 * 16 * 2 * 64 * 2


def facts_of(layers: int, weight: int, **changed: float) -> PlacementFacts:
    """Layers that are all alike."""
    values = {
        "fixed_bytes": 10_000,
        "layer_bytes": (weight,) * layers,
        "layout": layout_of([attention_state(2, 64, "bfloat16")] * layers, 16),
        "num_pages": 64,
        "sequences": 8,
        "sequence_pages": 8,
        "disk_bandwidth": 1e9,
        "memory_bandwidth": 1e10,
    }
    return PlacementFacts(**{**values, **changed})  # type: ignore[arg-type]


def method(memory: int, **options: object) -> FlexGen:
    return FlexGen(str(memory), "/anywhere", **options)  # type: ignore[arg-type]


@given(
    layers=st.integers(1, 6),
    weight=st.integers(1, 400_000),
    share=st.floats(0.05, 1.0),
    disk=st.floats(1e8, 1e11),
    overlap=st.booleans(),
)
def test_no_placement_that_fits_is_faster(
    layers: int, weight: int, share: float, disk: float, overlap: bool
) -> None:
    facts = facts_of(layers, weight, disk_bandwidth=disk)
    cap = int(share * facts.memory(Placement()))
    flexgen = method(cap, overlap=overlap)
    slots = 2 if overlap else 1
    every = [
        Placement(
            spread(list(range(layers)), streamed),
            spread(list(range(layers)), spilled),
            rows,
            min(facts.num_pages, rows * facts.sequence_pages),
            slots,
        )
        for streamed, spilled, rows in product(range(layers + 1), range(layers + 1), (1, 2, 4, 8))
    ]
    fitting = [each for each in every if facts.memory(each) <= cap]
    assume(fitting)
    found = flexgen.place(facts)
    assert facts.memory(found) <= cap
    assert flexgen.seconds(facts, found) <= min(flexgen.seconds(facts, each) for each in fitting)


def test_what_fits_stays_in_memory() -> None:
    facts = facts_of(4, 1000)
    assert not method(facts.memory(Placement())).place(facts).on_disk
    assert method(facts.memory(Placement()) - 1).place(facts).on_disk


def test_a_step_takes_what_is_read_or_computed() -> None:
    """By hand, for two layers of 1000 bytes, of which one is on disk, and so are its pages."""
    facts = facts_of(2, 1000, disk_bandwidth=100.0, memory_bandwidth=1000.0)
    placement = Placement(frozenset({1}), frozenset({0}), block_rows=4)
    reading = (1000 + PAGE * (8 * 8 / 2 + 8)) / 100
    computing = (2 * 2000 + 2 * PAGE * 8 * 8 / 2) / 1000
    assert method(1).seconds(facts, placement) == max(reading, computing)
    assert method(1, overlap=False).seconds(facts, placement) == reading + computing


def test_the_size_of_micro_batches() -> None:
    """Given, it is kept; chosen, it is as large as buffers may be, if a disk costs nothing."""
    facts = facts_of(8, 100_000)
    caps = [facts.memory(Placement()) * share // 100 for share in (40, 60, 80)]
    assert all(method(cap, micro_batch=2).place(facts).block_rows == 2 for cap in caps)
    least = facts_of(8, 1, disk_bandwidth=1e15)
    caps = [(10_016 + pages * PAGE) * 17 // 16 for pages in (16, 32, 64, 128)]
    rows = [method(cap).place(least).block_rows for cap in caps]
    assert rows == [1, 2, 4, 8]


def test_a_cap_that_is_too_low() -> None:
    facts = facts_of(4, 1000)
    with pytest.raises(ValueError, match=r"memory: at least (\d+) bytes are needed") as raised:
        method(1).place(facts)
    least = int(str(raised.value).split()[3])
    known = 10_000 + 2 * 1000 + 2 * 8 * PAGE
    assert least == known + known // 16
    with pytest.raises(ValueError, match="raise it, or lower max_model_len"):
        method(least - 1).place(facts)
    placed = method(least).place(facts)
    assert placed.streamed == placed.spilled == frozenset(range(4))


def test_layers_are_spread() -> None:
    assert spread([2, 4, 6, 8, 10, 12], 3) == {2, 6, 10}
    assert spread([0, 1, 2], 3) == {0, 1, 2} and spread([], 0) == spread([5], 0) == frozenset()
