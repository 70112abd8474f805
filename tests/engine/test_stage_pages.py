"""Pages of sequences that have other slots in each stage: reserved exactly, shared, given back."""

from __future__ import annotations

import pytest

from headrace.contracts.profile import Profile
from headrace.contracts.step import StepPlan
from headrace.engine.cache_accounting import CacheAccounting
from headrace.engine.sequence import Sequence
from tests.engine.builders import advance, make_sequence
from tests.engine.harness import make_layout
from tests.engine.hashed_tokens import HashedTokens

PROFILE = Profile(methods=(HashedTokens(part=10, share=0.5),))


def make(pages: int = 40) -> CacheAccounting:
    """Pages of four slots in groups of three stages: all tokens, a half and a quarter."""
    layout = make_layout((None,) * 4, 4, staged=True)
    assert [group.stage for group in layout.groups] == [0, 0, 1, 2]
    return CacheAccounting(layout, pages, 4, 64, share_prefixes=True)


def begin(accounting: CacheAccounting, tokens: int, n: int = 1) -> Sequence:
    sequence = make_sequence(range(tokens), profile=PROFILE, n=n)
    accounting.admit(sequence, accounting.match(sequence))
    return sequence


def feed(accounting: CacheAccounting, sequence: Sequence, count: int) -> StepPlan:
    plan = StepPlan()
    assert accounting.reserve(sequence, count, plan) == count
    advance(accounting, sequence, count)
    accounting.check_integrity([sequence])
    return plan


def held(sequence: Sequence) -> list[tuple[int, int]]:
    return [(group.slots, len(group.tail)) for group in sequence.groups]


def test_each_stage_holds_the_pages_of_its_own_slots() -> None:
    accounting = make()
    sequence = begin(accounting, 23)
    assert sequence.request.boundaries == (10, 20, 23)
    assert accounting.pages_to_admit(sequence, []) == 6 + 6 + 3 + 2
    plan = feed(accounting, sequence, 10)
    assert held(sequence) == [(10, 3), (10, 3), (5, 2), (3, 1)]
    assert sorted(plan.blank) == sorted(group.tail[-1] for group in sequence.groups)
    feed(accounting, sequence, 10)
    feed(accounting, sequence, 3)
    assert held(sequence) == [(23, 6), (23, 6), (12, 3), (7, 2)]
    sequence.token_ids += [1, 1]
    plan = feed(accounting, sequence, 2)
    assert held(sequence) == [(25, 7), (25, 7), (14, 4), (9, 3)]
    assert len(plan.blank) == 4 and accounting.pool.num_free == 40 - 21
    accounting.release(sequence)
    assert accounting.pool.num_free == 40 and accounting.num_cached == 0


def test_a_part_of_a_prompt_is_reserved_as_a_whole_or_not_at_all() -> None:
    accounting = make(pages=9)
    sequence = begin(accounting, 20)
    feed(accounting, sequence, 10)
    free = accounting.pool.num_free
    assert accounting.reserve(sequence, 10, StepPlan()) == 0
    assert accounting.pool.num_free == free == 0
    accounting.check_integrity([sequence])


def test_generated_tokens_get_as_many_slots_as_there_are() -> None:
    accounting = make(pages=9)
    sequence = begin(accounting, 10)
    feed(accounting, sequence, 10)
    sequence.token_ids += [1] * 5
    assert accounting.reserve(sequence, 5, StepPlan()) == 1, "the last stage's page has one more"


def test_the_last_pages_are_copied_where_they_are_shared() -> None:
    accounting = make()
    parent = begin(accounting, 10, n=2)
    feed(accounting, parent, 10)
    child = make_sequence(range(10), profile=PROFILE)
    accounting.fork(parent, child)
    accounting.check_integrity([parent, child])
    before = [group.tail[-1] for group in parent.groups]
    plan = StepPlan()
    child.token_ids.append(1)
    assert accounting.reserve(child, 1, plan) == 1
    advance(accounting, child, 1)
    assert [source for source, _ in plan.copies] == before
    assert [group.tail[-1] for group in child.groups] == [target for _, target in plan.copies]
    assert [group.tail[-1] for group in parent.groups] == before
    accounting.check_integrity([parent, child])
    for each in (parent, child):
        accounting.release(each)
    assert accounting.pool.num_free == 40


def test_integrity_check_finds_damage() -> None:
    accounting = make()
    sequence = begin(accounting, 10)
    feed(accounting, sequence, 10)
    accounting.tables[2, sequence.table_row, 0] += 1
    with pytest.raises(AssertionError, match="its table row is wrong"):
        accounting.check_integrity([sequence])
    accounting.tables[2, sequence.table_row, 0] -= 1
    sequence.groups[3].slots += 1
    with pytest.raises(AssertionError, match="are not pages of 3 slots"):
        accounting.check_integrity([sequence])
