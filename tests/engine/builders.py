"""Small sequences, caches and schedulers to test one part of the engine alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

from headrace.contracts.profile import EXACT, Profile
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.scheduling import StepBudget
from headrace.contracts.step import SampleState
from headrace.engine.cache_accounting import CacheAccounting
from headrace.engine.policies import make_policy
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Request, Sequence
from tests.engine.harness import make_layout

_numbers = itertools.count()


def make_sequence(
    tokens: SequenceOf[int],
    *,
    priority: int = 0,
    profile: Profile = EXACT,
    n: int = 1,
    prompt_logprobs: int | None = None,
) -> Sequence:
    """The first sequence of a request, later than all made before it."""
    params = SamplingParams(n=n, max_tokens=8, prompt_logprobs=prompt_logprobs)
    prompt = list(tokens)
    request = Request("request", prompt, params, 8, priority, profile, 0.0)
    for index in range(n):
        state = SampleState(params, prompt, [], index)
        request.sequences.append(Sequence(next(_numbers), request, index, state, None))
    return request.sequences[0]


def make_accounting(
    pages: int,
    *,
    groups: int = 1,
    block_size: int = 4,
    rows: int = 8,
    share_prefixes: bool = True,
) -> CacheAccounting:
    """Accounting of ``pages`` pages in all."""
    layout = make_layout((None,) * groups, block_size)
    return CacheAccounting(layout, pages, rows, 64, share_prefixes)


def make_scheduler(
    pages: int = 64, *, policy: str = "fcfs", tokens: int = 16, rows: int = 8
) -> Scheduler:
    """A scheduler over pages of four slots."""
    accounting = make_accounting(pages, rows=rows)
    return Scheduler(make_policy(policy), accounting, StepBudget(tokens, rows))


def advance(accounting: CacheAccounting, sequence: Sequence, count: int) -> None:
    """What the engine does after a row has fed ``count`` inputs."""
    sequence.num_fed += count
    sequence.num_slots += count
    sequence.next_position += count
    accounting.seal(sequence)


def run_step(scheduler: Scheduler) -> dict[int, int]:
    """Plan a step and commit it, with a token 1 for every row that samples.

    Returns:
        Sequence number -> inputs it fed.
    """
    plan = scheduler.plan(0.0)
    running = {s.number: s for s in scheduler.running}
    for row in plan.rows:
        sequence = running[row.sequence]
        advance(scheduler.accounting, sequence, len(row.input_ids))
        if row.samples:
            sequence.token_ids.append(1)
            sequence.state.output_token_ids.append(1)
    scheduler.accounting.check_integrity(scheduler.running)
    return {row.sequence: len(row.input_ids) for row in plan.rows}
