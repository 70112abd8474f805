"""Order, budgets, admission, preemption and overtaking."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contracts.scheduling import StepBudget
from headrace.engine.policies import make_policy
from headrace.engine.scheduler import OrderedSequences, Scheduler
from headrace.engine.sequence import Sequence, Status
from headrace.errors import ConfigurationError
from tests.engine.builders import advance, make_scheduler, make_sequence, run_step


def add(scheduler: Scheduler, length: int, *, priority: int = 0) -> Sequence:
    """Queue a sequence of tokens that nobody else has."""
    sequence = make_sequence([0] * length, priority=priority)
    sequence.token_ids[:] = [sequence.number + 10] * length
    scheduler.enqueue(sequence)
    return sequence


def decoding(scheduler: Scheduler, count: int, *, priority: int = 0) -> list[Sequence]:
    """Sequences with one pending token each."""
    sequences = [add(scheduler, 1, priority=priority) for _ in range(count)]
    run_step(scheduler)
    assert all(s.num_pending == 1 and s.status is Status.RUNNING for s in sequences)
    return sequences


def fork_one(scheduler: Scheduler, length: int = 1) -> Sequence:
    """A sequence that starts outside admission, as the completions of a request do."""
    sequence = make_sequence([1] * length)
    scheduler.accounting.admit(sequence, [])
    scheduler.start(sequence)
    return sequence


def test_a_prompt_is_fed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(tokens=16)
    sequence = add(scheduler, 40)
    assert [run_step(scheduler)[sequence.number] for _ in range(4)] == [16, 16, 8, 1]


def test_only_the_last_chunk_samples() -> None:
    scheduler = make_scheduler(tokens=16)
    sequence = add(scheduler, 20)
    assert [list(row.samples) for row in scheduler.plan(0.0).rows] == [[]]
    advance(scheduler.accounting, sequence, 16)
    (row,) = scheduler.plan(0.0).rows
    assert row.samples == [sequence.state]
    assert (row.slot, row.positions, list(row.input_ids)) == (
        16,
        range(16, 20),
        sequence.token_ids[16:],
    )


def test_chunks_and_decodes_share_a_step_and_chunks_take_what_is_left() -> None:
    scheduler = make_scheduler(tokens=16)
    decodes = decoding(scheduler, 3)
    long = add(scheduler, 100)
    for _ in range(3):
        fed = run_step(scheduler)
        assert fed == {**{s.number: 1 for s in decodes}, long.number: 13}


def test_decodes_never_starve_behind_an_older_prompt() -> None:
    scheduler = make_scheduler(tokens=8)
    long = add(scheduler, 50)
    assert run_step(scheduler) == {long.number: 8}
    short = fork_one(scheduler)
    assert run_step(scheduler) == {long.number: 7, short.number: 1}


def test_several_prompts_share_what_decodes_leave() -> None:
    scheduler = make_scheduler(tokens=8)
    first = add(scheduler, 12)
    run_step(scheduler)
    second, third = add(scheduler, 50), fork_one(scheduler)
    assert run_step(scheduler) == {first.number: 4, third.number: 1, second.number: 3}
    scheduler.remove(first)
    fourth, fifth = fork_one(scheduler, 20), fork_one(scheduler)
    assert run_step(scheduler) == {second.number: 6, third.number: 1, fifth.number: 1}
    assert fourth.status is Status.RUNNING


def test_the_first_in_order_moves_even_when_decodes_fill_the_budget() -> None:
    scheduler = make_scheduler(tokens=4)
    long = add(scheduler, 30)
    run_step(scheduler)
    for _ in range(6):
        fork_one(scheduler)
    fed = run_step(scheduler)
    assert fed[long.number] == 1 and sum(fed.values()) == 4


def test_rows_are_limited() -> None:
    scheduler = make_scheduler(rows=2)
    sequences = [add(scheduler, 1) for _ in range(3)]
    assert run_step(scheduler).keys() == {s.number for s in sequences[:2]}
    assert sequences[2].status is Status.WAITING


def test_nobody_overtakes_a_waiting_sequence_that_finds_no_room() -> None:
    scheduler = make_scheduler(pages=4)
    first = add(scheduler, 8)
    run_step(scheduler)
    large, small = add(scheduler, 12), add(scheduler, 1)
    assert run_step(scheduler).keys() == {first.number}
    assert small.status is Status.WAITING
    scheduler.remove(first)
    assert run_step(scheduler).keys() == {large.number, small.number}


def test_when_pages_run_out_the_last_in_order_loses_them() -> None:
    scheduler = make_scheduler(pages=4)
    sequences = [add(scheduler, 4) for _ in range(3)]
    run_step(scheduler)
    assert len(scheduler.running) == 3
    assert run_step(scheduler).keys() == {sequences[0].number, sequences[1].number}
    assert [s.status for s in sequences] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    assert scheduler.num_preemptions == sequences[2].request.metrics.num_preemptions == 1
    assert sequences[2].num_fed == 0 and sequences[2].token_ids[4:] == [1], "no token is lost"


def test_a_sequence_that_is_last_gives_itself_up() -> None:
    scheduler = make_scheduler(pages=2)
    first, second = add(scheduler, 3), add(scheduler, 4)
    run_step(scheduler)
    assert run_step(scheduler).keys() == {first.number}
    assert second.status is Status.WAITING


def test_the_first_in_order_is_never_preempted() -> None:
    scheduler = make_scheduler(pages=6, tokens=8, rows=4)
    first = add(scheduler, 4)
    for _ in range(6):
        add(scheduler, 4)
    for _ in range(17):
        assert first.number in run_step(scheduler)
    assert scheduler.num_preemptions > 0 and first.request.metrics.num_preemptions == 0


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(-1, 1)), min_size=1, max_size=12),
    st.sampled_from(("fcfs", "priority")),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_budgets_hold_and_the_first_in_order_moves(
    arrivals: list[tuple[int, int]], policy: str, tokens: int, rows: int
) -> None:
    scheduler = make_scheduler(pages=16, policy=policy, tokens=tokens, rows=rows)
    for length, priority in arrivals:
        add(scheduler, length, priority=priority)
        fed = run_step(scheduler)
        assert 0 < sum(fed.values()) <= tokens and len(fed) <= rows
        assert scheduler.running.items[0].number in fed
        for order in (scheduler.running, scheduler.waiting):
            keys = [scheduler.policy.key(s) for s in order]
            assert keys == sorted(keys)


def test_priority_takes_a_row_from_a_less_urgent_sequence() -> None:
    scheduler = make_scheduler(policy="priority", rows=2)
    low, lower = decoding(scheduler, 1, priority=5) + decoding(scheduler, 1, priority=6)
    urgent = add(scheduler, 3, priority=-1)
    assert run_step(scheduler) == {low.number: 1, urgent.number: 3}
    assert lower.status is Status.WAITING


def test_priority_takes_pages_from_less_urgent_sequences() -> None:
    scheduler = make_scheduler(pages=4, policy="priority")
    low = [add(scheduler, 8, priority=1), add(scheduler, 8, priority=2)]
    run_step(scheduler)
    urgent = add(scheduler, 12, priority=0)
    assert run_step(scheduler) == {urgent.number: 12}
    assert all(s.status is Status.WAITING for s in low)


def test_priority_comes_before_the_rest_of_a_less_urgent_prompt() -> None:
    scheduler = make_scheduler(policy="priority", tokens=8)
    low = add(scheduler, 50, priority=1)
    run_step(scheduler)
    urgent = add(scheduler, 6, priority=0)
    assert run_step(scheduler) == {urgent.number: 6, low.number: 2}
    assert scheduler.num_preemptions == 0


def test_priority_never_preempts_an_equal() -> None:
    scheduler = make_scheduler(policy="priority", rows=1)
    (first,) = decoding(scheduler, 1, priority=3)
    add(scheduler, 1, priority=3)
    assert run_step(scheduler).keys() == {first.number}


def test_first_come_first_served_ignores_priority() -> None:
    scheduler = make_scheduler(policy="fcfs", rows=1)
    (first,) = decoding(scheduler, 1, priority=9)
    add(scheduler, 1, priority=0)
    assert run_step(scheduler).keys() == {first.number}


def test_a_policy_may_lower_the_budget() -> None:
    scheduler = make_scheduler(tokens=16, rows=8)
    scheduler.policy.budget = lambda running, limit: StepBudget(5, 2)  # type: ignore[method-assign]
    for _ in range(3):
        add(scheduler, 4)
    fed = run_step(scheduler)
    assert list(fed.values()) == [4, 1]


def test_prefix_hits_are_counted_once_per_request() -> None:
    scheduler = make_scheduler()
    first = make_sequence(range(8))
    scheduler.enqueue(first)
    run_step(scheduler)
    second = make_sequence(range(9))
    scheduler.enqueue(second)
    run_step(scheduler)
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (17, 8)
    assert second.request.metrics.num_cached_tokens == 8
    scheduler.preempt(second)
    run_step(scheduler)
    assert second.status is Status.RUNNING
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (17, 8)


@given(st.lists(st.integers(-2, 2), max_size=30), st.randoms(use_true_random=False))
def test_ordered_sequences_stay_in_order(priorities: list[int], choice: random.Random) -> None:
    order = OrderedSequences(make_policy("priority"))
    kept = [make_sequence([1], priority=priority) for priority in priorities]
    for sequence in choice.sample(kept, len(kept)):
        order.add(sequence)
    for sequence in choice.sample(kept, len(kept) // 2):
        order.remove(sequence)
        kept.remove(sequence)
        with pytest.raises(ValueError, match="is not in this order"):
            order.remove(sequence)
    assert list(order) == sorted(kept, key=lambda s: (s.priority, s.arrival))
    assert len(order) == len(kept)


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"scheduling_policy: .*fcfs, priority"):
        make_policy("random")
