"""Reservation, copy-on-write, sealing and sharing of pages, one at a time."""

from __future__ import annotations

import pytest

from headrace.contracts.profile import Profile
from headrace.contracts.step import StepPlan
from headrace.engine.cache_accounting import CacheAccounting
from headrace.engine.sequence import Sequence
from tests.engine.builders import advance, make_accounting, make_sequence


def admit(accounting: CacheAccounting, sequence: Sequence) -> int:
    """Admit with what the cache has; the number of cached tokens."""
    accounting.admit(sequence, accounting.match(sequence))
    return sequence.num_fed


def feed(accounting: CacheAccounting, sequence: Sequence) -> StepPlan:
    """Admit and feed everything that is pending."""
    admit(accounting, sequence)
    plan = StepPlan()
    count = sequence.num_pending
    assert accounting.reserve(sequence, count, plan) == count
    advance(accounting, sequence, count)
    return plan


def table(accounting: CacheAccounting, sequence: Sequence, group: int = 0) -> list[int]:
    count = accounting.layout.pages_for(sequence.num_slots)
    pages: list[int] = accounting.tables[group, sequence.table_row, :count].tolist()
    return pages


def test_full_pages_are_sealed_and_the_rest_stays_in_the_tail() -> None:
    accounting = make_accounting(8)
    sequence = make_sequence(range(10))
    plan = feed(accounting, sequence)
    assert [run.key for run in sequence.runs] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [len(column) for column in sequence.tail] == [1]
    assert plan.blank == sequence.tail[0] and plan.copies == []
    accounting.check_integrity([sequence])


def test_pages_that_fill_up_at_once_are_not_blanked() -> None:
    accounting = make_accounting(8)
    assert feed(accounting, make_sequence(range(8))).blank == []


def test_a_released_prefix_is_found_again_up_to_its_last_token() -> None:
    accounting = make_accounting(8)
    first = make_sequence(range(8))
    feed(accounting, first)
    pages = table(accounting, first)
    accounting.release(first)
    assert accounting.num_cached == 2
    same, longer = make_sequence(range(8)), make_sequence([*range(8), 1])
    assert admit(accounting, same) == 4, "one token has to be fed for its logits"
    assert admit(accounting, longer) == 8
    assert table(accounting, longer) == pages
    assert accounting.num_cached == 0
    accounting.check_integrity([same, longer])


def test_cached_pages_serve_only_their_profile() -> None:
    accounting = make_accounting(8)
    feed(accounting, make_sequence(range(9)))
    assert admit(accounting, make_sequence(range(9), profile=Profile(salt="other"))) == 0


def test_a_prompt_that_is_scored_is_not_taken_from_the_cache() -> None:
    accounting = make_accounting(8)
    feed(accounting, make_sequence(range(9)))
    assert admit(accounting, make_sequence(range(9), prompt_logprobs=0)) == 0


def test_without_sharing_nothing_is_cached() -> None:
    accounting = make_accounting(8, share_prefixes=False)
    sequence = make_sequence(range(9))
    feed(accounting, sequence)
    accounting.release(sequence)
    assert (accounting.num_cached, accounting.pool.num_free) == (0, 8)


def test_the_same_run_computed_twice_is_kept_once() -> None:
    accounting = make_accounting(8)
    one, two = make_sequence(range(6)), make_sequence(range(6))
    for sequence in (one, two):
        accounting.admit(sequence, [])
        accounting.reserve(sequence, 6, StepPlan())
    for sequence in (one, two):
        advance(accounting, sequence, 6)
    assert one.runs == two.runs
    assert table(accounting, one)[0] == table(accounting, two)[0]
    assert accounting.pool.num_free == 8 - 3
    accounting.check_integrity([one, two])


@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_of_the_sharers_writes_in_place(groups: int) -> None:
    accounting = make_accounting(8 * groups, groups=groups)
    first, second, third = make_sequence(range(6), n=3).request.sequences
    feed(accounting, first)
    shared = [table(accounting, first, group)[1] for group in range(groups)]
    for child in (second, third):
        accounting.fork(first, child)
    accounting.check_integrity([first, second, third])
    plans = [StepPlan(), StepPlan(), StepPlan()]
    for sequence, plan in zip((first, second, third), plans, strict=True):
        assert accounting.reserve(sequence, 1, plan) == 1
    assert [[source for source, _ in plan.copies] for plan in plans] == [shared, shared, []]
    for group in range(groups):
        pages = [table(accounting, s, group)[1] for s in (first, second, third)]
        assert len(set(pages)) == 3 and pages[2] == shared[group]
        assert [plan.copies[group][1] for plan in plans[:2]] == pages[:2]
    for sequence in (first, second, third):
        advance(accounting, sequence, 1)
    accounting.check_integrity([first, second, third])


def test_sharers_of_full_pages_copy_nothing() -> None:
    accounting = make_accounting(8)
    first, second = make_sequence(range(8), n=2).request.sequences
    feed(accounting, first)
    accounting.fork(first, second)
    plan = StepPlan()
    assert accounting.reserve(first, 1, plan) == accounting.reserve(second, 1, plan) == 1
    assert plan.copies == [] and len(set(plan.blank)) == 2


def test_reservation_gives_what_there_is() -> None:
    accounting = make_accounting(3)
    sequence = make_sequence(range(20))
    admit(accounting, sequence)
    assert accounting.reserve(sequence, 20, StepPlan()) == 12
    advance(accounting, sequence, 12)
    assert accounting.reserve(sequence, 8, StepPlan()) == 0


def test_a_refused_reservation_changes_nothing() -> None:
    accounting = make_accounting(2)
    first, second = make_sequence(range(6), n=2).request.sequences
    feed(accounting, first)
    accounting.fork(first, second)
    plan, before = StepPlan(), accounting.tables.copy()
    assert accounting.reserve(first, 1, plan) == 0, "the copy finds no page"
    assert plan == StepPlan() and (accounting.tables == before).all()
    accounting.check_integrity([first, second])


def test_idle_pages_are_evicted_for_new_ones_but_held_ones_never() -> None:
    accounting = make_accounting(4)
    old, held = make_sequence([1, 1, 1, 1]), make_sequence([2, 2, 2, 2])
    feed(accounting, old)
    feed(accounting, held)
    accounting.release(old)
    assert (accounting.pool.num_free, accounting.num_available) == (2, 3)
    new = make_sequence(range(5, 17))
    admit(accounting, new)
    assert accounting.reserve(new, 12, StepPlan()) == 12
    assert accounting.match(make_sequence([1, 1, 1, 1, 1])) == []
    assert accounting.match(make_sequence([2, 2, 2, 2, 2])) == held.runs
    advance(accounting, new, 12)
    accounting.check_integrity([held, new])


def test_admission_counts_idle_pages_that_it_would_adopt() -> None:
    accounting = make_accounting(4)
    old = make_sequence(range(8))
    feed(accounting, old)
    new = make_sequence(range(12))
    runs = accounting.match(new)
    assert (len(runs), accounting.pages_to_admit(new, runs)) == (2, 1)
    accounting.release(old)
    assert accounting.pages_to_admit(new, runs) == 3, "adopted, they are no longer available"


def test_integrity_check_finds_damage() -> None:
    accounting = make_accounting(8)
    sequence = make_sequence(range(6))
    feed(accounting, sequence)
    with pytest.raises(AssertionError):
        accounting.check_integrity([])
    accounting.tables[0, sequence.table_row, 0] += 1
    with pytest.raises(AssertionError, match="its table row is wrong"):
        accounting.check_integrity([sequence])
    accounting.tables[0, sequence.table_row, 0] -= 1
    sequence.num_slots += 4
    with pytest.raises(AssertionError, match="holds 2 columns"):
        accounting.check_integrity([sequence])
