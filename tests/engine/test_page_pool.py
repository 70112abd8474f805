"""Free pages and reference counts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.page_pool import OutOfPagesError, PagePool

PAGES = 6
operations = st.lists(
    st.tuples(st.sampled_from(("allocate", "retain", "release")), st.integers(0, PAGES + 1)),
    max_size=60,
)


@given(operations)
def test_pages_are_held_exactly_as_often_as_asked(steps: list[tuple[str, int]]) -> None:
    pool, held = PagePool(PAGES), Counter[int]()
    for action, number in steps:
        if action == "allocate" and number > PAGES - len(held):
            with pytest.raises(OutOfPagesError):
                pool.allocate(number)
        elif action == "allocate":
            pages = pool.allocate(number)
            assert len(set(pages)) == number and not held.keys() & set(pages)
            held.update(pages)
        elif held:
            page = sorted(held)[number % len(held)]
            if action == "retain":
                pool.retain(page)
                held[page] += 1
            else:
                pool.release(page)
                held[page] -= 1
                held += Counter()  # drops zeros
        assert pool.num_free == PAGES - len(held)
        pool.check_integrity([held[page] for page in range(PAGES)])


def test_a_free_page_is_neither_shared_nor_released() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.release(page)
    with pytest.raises(ValueError, match="is free and cannot be shared"):
        pool.retain(page)
    with pytest.raises(ValueError, match="released more often than held"):
        pool.release(page)


def test_refused_allocation_takes_nothing() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="2 pages wanted, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool.references.__setitem__(0, 2), r"pages \[0\] have wrong reference"),
        (lambda pool: pool._free.append(2), "in the free list twice"),
        (lambda pool: pool._free.remove(2), "free list and the reference counts disagree"),
    ],
)
def test_integrity_check_finds_damage(damage: object, message: str) -> None:
    pool = PagePool(3)
    held = pool.allocate(1)
    expected = [int(page in held) for page in range(3)]
    pool.check_integrity(expected)
    damage(pool)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(expected)
