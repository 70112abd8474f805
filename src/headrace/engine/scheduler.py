"""Which sequences feed how many inputs in the coming step."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from headrace.contracts.kv_codec import KVCodec
from headrace.contracts.method import of_kind
from headrace.contracts.scheduling import SchedulerPolicy, StepBudget
from headrace.contracts.step import CodedContext, Compaction, PlanRow, StepPlan
from headrace.engine.cache_accounting import CacheAccounting
from headrace.engine.gang import Gang
from headrace.engine.sequence import Sequence, Status

ADMISSION_RESERVE = 0.01
"""Share of the pages that admission leaves free for running sequences to grow into, lest a
sequence be admitted only to be preempted a few steps later."""


class OrderedSequences:
    """Sequences in the order of a policy's key, which never changes for a sequence."""

    def __init__(self, policy: SchedulerPolicy) -> None:
        self._policy = policy
        self._keys: list[tuple[int, ...]] = []
        self.items: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Insert at its place."""
        key = self._policy.key(sequence)
        place = bisect_left(self._keys, key)
        insort(self._keys, key)
        self.items.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in."""
        place = bisect_left(self._keys, self._policy.key(sequence))
        if place >= len(self.items) or self.items[place] is not sequence:
            raise ValueError(f"sequence {sequence.number} is not in this order")
        del self._keys[place], self.items[place]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.items)


class Scheduler:
    """Plans steps within a budget of inputs, rows and pages.

    Running sequences are served in the policy's order; each that has one pending input is sure
    of its place, and longer ones share what is left of the budget in chunks. When pages run out,
    the last sequence in order is preempted: it loses its pages and waits to be computed again.

    A gang is in these orders as its leader. Its members feed one input each, all in one step or
    none of them: it waits a step where there is not enough of the budget left for all.

    With ``whole_prompts``, a prompt is fed in one step, which must have room for any.
    """

    def __init__(
        self,
        policy: SchedulerPolicy,
        accounting: CacheAccounting,
        limit: StepBudget,
        whole_prompts: bool = False,
    ) -> None:
        self.policy = policy
        self.accounting = accounting
        self.limit = limit
        self._whole_prompts = whole_prompts
        self._drafting: list[tuple[Sequence, PlanRow]] = []
        self.waiting = OrderedSequences(policy)
        self.running = OrderedSequences(policy)
        self.num_preemptions = 0
        self.pages_peak = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def plan(self, now: float) -> StepPlan:
        """The next step; empty when nothing can run."""
        plan = StepPlan()
        self._overtake(now)
        budget = self.policy.budget(self.running.items, self.limit)
        singles = sum(
            len(feeding_members(sequence)) if sequence.begin else sequence.num_pending == 1
            for sequence in self.running
        )
        spare = max(1, budget.tokens - singles)
        left = budget.tokens
        for sequence in list(self.running):
            if len(plan.rows) >= budget.rows or left == 0:
                break
            if sequence.table_row < 0:
                continue
            if sequence.begin:
                left -= self._schedule_gang(sequence, budget.rows, left, plan)
                continue
            single = sequence.num_pending == 1
            count = self._schedule(sequence, min(left, 1 if single else spare), plan)
            spare -= 0 if single else count
            left -= count
        self._admit(plan, budget.rows, left, now)
        self._make_draft_room(plan, budget.tokens - plan.num_inputs)
        if plan.rows:
            plan.state_copies = self.accounting.take_state_copies()
        pages = self.accounting.pool.num_pages - self.accounting.num_available
        self.pages_peak = max(self.pages_peak, pages)
        return plan

    def _schedule(self, sequence: Sequence, most: int, plan: StepPlan) -> int:
        """Plan up to ``most`` pending inputs of a running sequence, preempting if it must."""
        request, wanted = sequence.request, min(most, sequence.num_feedable)
        if wanted == 0:
            return 0
        in_part = request.stages is not None and sequence.num_fed < request.stages.prompt
        if in_part and wanted < sequence.num_feedable:
            return 0
        while (count := self.accounting.reserve(sequence, wanted, plan)) == 0:
            victim = self.running.items[self.policy.victim(self.running.items)]
            self.preempt(victim)
            if victim is sequence:
                return 0
        plan.rows.append(plan_row(sequence, count))
        if request.schedule is not None:
            note_compaction(plan.rows[-1], sequence)
        if request.units:
            plan.rows[-1].coded = coded_context(sequence)
        if sequence.draft_room > 0:
            self._drafting.append((sequence, plan.rows[-1]))
        return count

    def _schedule_gang(self, leader: Sequence, rows: int, most: int, plan: StepPlan) -> int:
        """Plan an input of each member that feeds one, preempting if it must."""
        feeding = feeding_members(leader)
        if len(feeding) > min(most, rows - len(plan.rows)):
            return 0
        while not self.accounting.has_slots(feeding):
            victim = self.running.items[self.policy.victim(self.running.items)]
            self.preempt(victim)
            if victim is leader:
                return 0
        for member in feeding:
            self.accounting.reserve(member, 1, plan)
            plan.rows.append(plan_row(member, 1))
        return len(feeding)

    def _make_draft_room(self, plan: StepPlan, left: int) -> None:
        """Let rows guess tokens, with inputs and pages that nobody else wants."""
        for sequence, row in self._drafting:
            wanted = min(sequence.draft_room, left)
            if wanted > 0:
                row.draft_room = self.accounting.reserve_draft(sequence, wanted, plan)
                left -= row.draft_room
        self._drafting.clear()

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits, and its known tokens are fed again."""
        self.running.remove(sequence)
        for each in sequence.together:
            self.accounting.release(each)
        sequence.request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.enqueue(sequence)

    def _overtake(self, now: float) -> None:
        """Start waiting sequences that running ones must give way to.

        It comes before any row is planned, since a planned sequence cannot lose its pages.
        """
        while self.waiting and self.running:
            first, last = self.waiting.items[0], self.running.items[-1]
            if not self.policy.overtakes(first, last):
                return
            if not self._start_waiting(first, now):
                self.preempt(last)

    def _admit(self, plan: StepPlan, rows: int, tokens: int, now: float) -> None:
        """Start waiting sequences, in order, while there is room of every kind."""
        while self.waiting and len(plan.rows) < rows and tokens > 0:
            sequence = self.waiting.items[0]
            if self._whole_prompts and sequence.num_pending > tokens:
                return
            if sequence.request.stages is not None and sequence.num_feedable > tokens:
                return
            if not self._start_waiting(sequence, now):
                return
            tokens -= self._schedule(sequence, tokens, plan)

    def _start_waiting(self, sequence: Sequence, now: float) -> bool:
        """Give a waiting sequence a table row and cached pages, if all its tokens have room."""
        runs = self.accounting.match(sequence)
        needed = self.accounting.pages_to_admit(sequence, runs)
        if self.running:
            needed += int(self.accounting.pool.num_pages * ADMISSION_RESERVE)
        rows = len(sequence.together)
        if rows > self.accounting.num_free_rows or needed > self.accounting.num_available:
            return False
        self.waiting.remove(sequence)
        self.accounting.admit(sequence, runs)
        for member in sequence.together[1:]:
            self.accounting.take_row(member)
        self.start(sequence)
        self._note_first_admission(sequence, now)
        return True

    def _note_first_admission(self, sequence: Sequence, now: float) -> None:
        metrics = sequence.request.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = now
            metrics.num_cached_tokens = sequence.num_fed
            self.prefix_query_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += sequence.num_fed

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence that holds no pages wait for them."""
        _set_status(sequence, Status.WAITING)
        self.waiting.add(sequence)

    def start(self, sequence: Sequence) -> None:
        """Count a sequence that was given pages among the running."""
        _set_status(sequence, Status.RUNNING)
        self.running.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, giving back what it holds; of a gang, with its last member."""
        if sequence.request.gang is not None:
            self._remove_member(sequence, sequence.request.gang)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.accounting.release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def _remove_member(self, member: Sequence, gang: Gang) -> None:
        # What it has not fed, it never will: the others see what it has.
        del member.token_ids[member.num_fed :]
        if any(each.status is not Status.FINISHED for each in gang.members if each is not member):
            return
        if member.status is Status.WAITING:
            self.waiting.remove(gang.leader)
        else:
            self.running.remove(gang.leader)
            for each in gang.members:
                self.accounting.release(each)

    @property
    def holders(self) -> list[Sequence]:
        """The sequences that have a table row: those that run, and all members of their gangs."""
        return [each for sequence in self.running for each in sequence.together]


def feeding_members(leader: Sequence) -> list[Sequence]:
    """The members of a gang that has parted which feed an input in the coming step."""
    return [member for member in leader.together if member.num_pending > 0]


def _set_status(sequence: Sequence, status: Status) -> None:
    for each in sequence.together:
        if each.status is not Status.FINISHED:
            each.status = status


def plan_row(sequence: Sequence, count: int) -> PlanRow:
    """The row that feeds the next ``count`` pending inputs.

    It samples when it reaches the last known token, once per completion while the sequences of
    the request have not parted.
    """
    start, end = sequence.num_fed, sequence.num_fed + count
    request, known = sequence.request, sequence.token_ids
    row = PlanRow(
        sequence.number,
        sequence.table_row,
        known[start:end],
        range(sequence.next_position, sequence.next_position + count),
        sequence.num_slots,
        pooling=request.pooling,
        adapter=request.profile.adapter,
        methods=request.profile.methods,
        first=start == sequence.num_adopted,
    )
    if end == len(known) and request.max_tokens > 0 and sequence.status is not Status.FINISHED:
        parted = bool(sequence.state.output_token_ids) or sequence.begin > 0
        row.samples = [sequence.state] if parted else [s.state for s in request.sequences]
    prompt = len(request.prompt_token_ids)
    if start < prompt:
        row.num_prompt = min(count, prompt - start)
        row.num_quiet = min(count, prompt - 1 - start)
        if request.num_unscored and end + request.num_unscored >= prompt:
            row.score_ids = request.prompt_token_ids[start + 1 : end + 1]
            row.score_top = request.params.prompt_logprobs or 0
    if sequence.begin and request.gang is not None:
        row.begin, row.segments = sequence.begin, request.gang.segments(sequence)
    if sequence.groups:
        row.slots = [held.slots for held in sequence.groups]
    return row


def note_compaction(row: PlanRow, sequence: Sequence) -> None:
    """Say what the policy of slots does in the row's step."""
    policy, schedule = sequence.request.slot_policy, sequence.request.schedule
    assert policy is not None and schedule is not None
    if schedule.observes(sequence.num_fed):
        row.observer = policy
    if sequence.spare:
        pages = np.array(sequence.spare, dtype=np.int32).T
        row.compaction = Compaction(policy, schedule.budget, pages)


def coded_context(sequence: Sequence) -> CodedContext:
    """The units of a sequence, and those that its slots become."""
    units = sequence.request.units
    [codec] = of_kind(sequence.request.profile.methods, KVCodec)
    spare = [page for column in sequence.spare for page in column]
    found: list[npt.NDArray[np.int32]] = []
    filled: list[npt.NDArray[np.int32]] = []
    end = 0
    for index, unit in enumerate(units):
        if sequence.groups:
            pages, fills = sequence.groups[index].units, sequence.groups[index].fills
        else:
            part = slice(end, end := end + unit.pages)
            pages = [list(run.pages[part]) for run in sequence.units]
            fills = [spare[part]] if spare else []
        for made, rows in ((found, pages), (filled, fills)):
            made.append(np.array(rows, dtype=np.int32).reshape(-1, unit.pages))
    return CodedContext(codec, units, found, filled)
