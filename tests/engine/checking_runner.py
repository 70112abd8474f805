"""A runner that proves, step by step, that every row reads exactly its own history."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.contracts.drafting import DraftMethod
from headrace.contracts.gang import gang_method
from headrace.contracts.kv_policy import SealedPages
from headrace.contracts.method import MethodCard
from headrace.contracts.outputs import TokenLogprobs
from headrace.contracts.profile import Profile
from headrace.contracts.slot_policy import CompactionSchedule
from headrace.contracts.step import (
    PageTables,
    PlanRow,
    Pooling,
    RowResult,
    Runner,
    SampleState,
    StepPlan,
    StepResult,
    Ticket,
)
from headrace.engine.engine import Engine
from headrace.engine.sequence import Sequence, Status
from tests.engine.gang_checks import (
    Part,
    block_histories,
    expected_parts,
    expected_tokens,
    known_blocks,
)
from tests.engine.hashed_slots import HashedSlots

Vector = npt.NDArray[np.float32]

History = int
"""Stands for everything that the keys and values of a slot depend on."""


class Slot(NamedTuple):
    """What a slot holds in place of keys and values."""

    token: int
    position: int
    history: History


BLANK = Slot(-1, -1, -1)
POISON = Slot(-2, -2, -2)
"""What a failed step leaves behind (NaN, say): nobody may ever read it."""


def refused(sequence: Sequence) -> Slot:
    """What a guess that was wrong leaves in a page that its sequence goes on to hold."""
    return Slot(-3, -3, sequence.number)


@dataclass(frozen=True, slots=True)
class Guessing(DraftMethod):
    """Tokens that a ``CheckingRunner`` guesses, right or wrong.

    Args:
        length: in one step at most.
        always: without regard to what it gains.
    """

    card: ClassVar[MethodCard] = MethodCard("", "Guesses.", "exact")
    length: int = 3
    always: bool = True

    @property
    def most_drafted(self) -> int:
        return self.length

    @property
    def always_on(self) -> bool:
        return self.always


class Violation(BaseException):
    """The engine broke its contract with the runner. No ``Exception``: engines survive those."""


def begin(profile: Profile) -> History:
    """The history before the first token."""
    return zlib.crc32(repr(profile.of_cache).encode())


def extend(history: History, token: int) -> History:
    """The history after one more token."""
    return hash((history, token))


def histories(profile: Profile, tokens: SequenceOf[int]) -> list[History]:
    """The history after each token."""
    found, history = [], begin(profile)
    for token in tokens:
        history = extend(history, token)
        found.append(history)
    return found


def draw(history: History, seed: int, number: int, banned: SequenceOf[int], vocab: int) -> int:
    """The ``number``-th token of a sequence: a function of all that came before, and its seed."""
    token = hash((history, seed, number)) % vocab
    while token in banned:
        token = (token + 1) % vocab
    return token


def pool(known: SequenceOf[History], pooling: Pooling) -> Vector:
    """What the inputs of a row make of an embedding: that of one of them, or the sum over all."""
    chosen = {"first": known[:1], "last": known[-1:], "mean": known}[pooling]
    return np.array([sum(history % 1000 for history in chosen)], dtype=np.float32)


def score(history: History, token: int) -> TokenLogprobs:
    """The log-probability of a known token after a history."""
    return TokenLogprobs(token, -1.0 - hash((history, token)) % 1000, 1, ())


def require(condition: bool, message: str, *details: object) -> None:
    if not condition:
        raise Violation(" ".join((message, *map(repr, details))))


@dataclass
class Fault:
    """What goes wrong in the coming step.

    "early", "submit" and "collect" raise there, "interrupt" is Ctrl-C, "rows" fails some rows
    alone.
    """

    kind: Literal["early", "submit", "collect", "interrupt", "rows"]
    rows: int = 1
    """Bits choose the rows; the first always fails."""


class Guesses(NamedTuple):
    """What is guessed for a row: so many tokens, of which all but the last of ``tokens`` are
    right, and that one comes after them.
    """

    length: int
    tokens: list[int]

    @property
    def right(self) -> int:
        return max(0, len(self.tokens) - 1)


@dataclass
class Seen:
    """What happened so far, so that tests can ask whether they tested anything."""

    steps: int = 0
    rows: int = 0
    inputs: int = 0
    copies: int = 0
    blanks: int = 0
    chunks: int = 0
    mixed: int = 0
    forks: int = 0
    late_forks: int = 0
    """Completions that lost the shared prompt before they went on: no row was free, say."""
    resumed: int = 0
    dropped: int = 0
    """Pages that a policy had freed, counted in every step."""
    coded: int = 0
    """Rows whose slots became a unit."""
    compacted: int = 0
    """Rows whose slots were reduced."""
    compacted_hits: int = 0
    """Rows that begin behind a compaction that another sequence has made."""
    passed: int = 0
    """Slots before a window, counted in every step."""
    seen_by_others: int = 0
    """Slots of others that rows read, counted in every step."""
    kept: int = 0
    """Rows of members of gangs that had ended and were computed again for the others."""
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    all_wrong: int = 0
    all_right: int = 0
    beside_others: int = 0
    """Guesses in steps that other rows, without them, were in."""
    failed: set[str] = field(default_factory=set)


class CheckingRunner(Runner):
    """Keeps for every slot of every page the token, its position and its history.

    It executes copies and blanks, writes the rows' inputs, and then reads the whole context of
    each row back through the page tables, as attention does. Tokens are drawn from what was read.

    Args:
        inner: moves the clock.
        engine: whose scheduler says what the sequences are.
        vocab: tokens are below it.
        causal: whether prompts may be fed in parts.
    """

    def __init__(
        self,
        inner: Runner,
        engine: Engine,
        vocab: int,
        causal: bool = True,
    ) -> None:
        self._causal = causal
        self.seen = Seen()
        self.fault: Fault | None = None
        self.failed_requests: set[str] = set()
        self._inner = inner
        self._engine = engine
        self._vocab = vocab
        layout = engine.scheduler.accounting.layout
        self._size = layout.block_size
        self._windows = [group.window for group in layout.groups]
        self._groups = range(len(layout.groups))
        self._states: dict[int, History] = {}
        self._has_states = bool(layout.all_states)
        self._has_schedules = False
        self._all_have_states = bool(layout.states)
        self._pages = [[POISON] * self._size for _ in range(engine.stats().pages_total)]
        self._units: dict[int, list[Slot]] = {}
        self._fed: dict[int, int] = {}
        self._resumed: dict[str, int] = {}
        self._results: dict[Ticket, tuple[StepResult, Fault | None]] = {}
        self.beginnings: dict[str, SequenceOf[SequenceOf[int]]] = {}
        """Of gangs, by request."""

    # -- the runner's side ------------------------------------------------------------------

    def submit(self, plan: StepPlan, tables: PageTables) -> Ticket:
        fault, self.fault = self.fault, None
        running = {s.number: s for s in self._engine.scheduler.holders}
        self._has_schedules |= any(s.request.schedule is not None for s in running.values())
        self._check_plan(plan, running)
        failing = self._failing_rows(plan, fault)
        if fault is not None:
            self.seen.failed.add(fault.kind)
            requests = [running[plan.rows[index].sequence].request for index in failing]
            self.failed_requests = {request.request_id for request in requests}
        if fault is not None and fault.kind == "early":
            raise RuntimeError("injected before anything is done")
        self._copy(plan)
        self._copy_states(plan)
        for page in plan.blank:
            self._pages[page] = [BLANK] * self._size
        written: set[tuple[int, int]] = set()
        guesses = [self._guess(row, running[row.sequence]) for row in plan.rows]
        for index, row in enumerate(plan.rows):
            sequence, fails = running[row.sequence], index in failing
            self._write(row, sequence, tables, written, fails)
            self._write_guesses(row, sequence, tables, written, guesses[index], fails)
        if fault is not None and fault.kind == "submit":
            raise RuntimeError("injected into submit")
        results: list[RowResult] = [
            RowResult(error="injected into a row")
            if index in failing
            else self._run(row, running[row.sequence], tables, guesses[index])
            for index, row in enumerate(plan.rows)
        ]
        for index, row in enumerate(plan.rows):
            if index not in failing:
                self._compact(row, running[row.sequence], tables)
                self._code(row, tables)
        self._count(plan)
        self._count_guesses(plan, guesses)
        ticket = self._inner.submit(plan, tables)
        self._results[ticket] = (StepResult(results), fault)
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        self._inner.collect(ticket)
        result, fault = self._results.pop(ticket)
        if fault is not None and fault.kind == "collect":
            raise RuntimeError("injected into collect")
        if fault is not None and fault.kind == "interrupt":
            raise KeyboardInterrupt
        return result

    @staticmethod
    def _failing_rows(plan: StepPlan, fault: Fault | None) -> set[int]:
        if fault is None:
            return set()
        everything = set(range(len(plan.rows)))
        if fault.kind != "rows":
            return everything
        return {index for index in everything if index == 0 or fault.rows >> index & 1}

    def _copy(self, plan: StepPlan) -> None:
        for source, target in plan.copies:
            self._pages[target] = list(self._pages[source])

    def _copy_states(self, plan: StepPlan) -> None:
        """The states of sequences that parted, whether or not they are in the plan."""
        for source, target in plan.state_copies:
            require(self._has_states or self._has_schedules, "there are no states to copy", plan)
            require(source in self._states or not self._all_have_states, "no state to copy", plan)
            self._states[target] = self._states.get(source, POISON.history)

    def _advance_state(self, row: PlanRow, sequence: Sequence, known: list[History]) -> None:
        """The state has to be what the row has fed so far; it goes on with the step's inputs."""
        methods = sequence.request.profile.methods
        watched = self._has_states and any(method.needs_all_inputs for method in methods)
        if not (self._all_have_states or watched):
            return
        past = begin(sequence.request.profile)
        if not row.first:
            require(row.table_row in self._states, "a row begins without its state", row)
            past = self._states[row.table_row]
        fed = sequence.num_fed
        expected = known[fed - 1] if fed else begin(sequence.request.profile)
        require(past == expected, "a wrong state is read", row, past, expected)
        self._states[row.table_row] = known[fed + len(row.input_ids) - 1]

    def _write(
        self,
        row: PlanRow,
        sequence: Sequence,
        tables: PageTables,
        written: set[tuple[int, int]],
        failing: bool,
    ) -> None:
        known = self._histories(sequence)
        for offset, (token, position) in enumerate(zip(row.input_ids, row.positions, strict=True)):
            column, place = divmod(row.slot + offset, self._size)
            content = POISON if failing else Slot(token, position, known[sequence.num_fed + offset])
            for group in self._groups:
                page = int(tables[group, row.table_row, column])
                require((page, place) not in written, "two inputs go to one slot", row, page)
                written.add((page, place))
                self._pages[page][place] = content

    def _guess(self, row: PlanRow, sequence: Sequence) -> Guesses:
        """Some tokens for the room that there is, of which the first ones are right."""
        if row.draft_room == 0:
            return Guesses(0, [])
        [state] = row.samples
        length = hash((state.seed, row.slot)) % (row.draft_room + 1)
        right = hash((row.slot, state.seed)) % (length + 1)
        history = histories(sequence.request.profile, sequence.token_ids)[-1]
        tokens: list[int] = []
        for _ in range(right + 1):
            tokens.append(self._sample(history, state.after(tokens)))
            history = extend(history, tokens[-1])
        return Guesses(length, tokens)

    def _write_guesses(
        self,
        row: PlanRow,
        sequence: Sequence,
        tables: PageTables,
        written: set[tuple[int, int]],
        guesses: Guesses,
        failing: bool,
    ) -> None:
        """The guesses go to the slots behind the row's own; those that were wrong stay there."""
        history = histories(sequence.request.profile, sequence.token_ids)[-1]
        for offset in range(guesses.length):
            content = refused(sequence)
            if offset < guesses.right:
                history = extend(history, guesses.tokens[offset])
                content = Slot(guesses.tokens[offset], row.positions.stop + offset, history)
            column, place = divmod(row.slot + len(row.input_ids) + offset, self._size)
            for group in self._groups:
                page = int(tables[group, row.table_row, column])
                require((page, place) not in written, "a guess goes to another's slot", row, page)
                written.add((page, place))
                self._pages[page][place] = POISON if failing else content

    def _count_guesses(self, plan: StepPlan, guesses: SequenceOf[Guesses]) -> None:
        seen = self.seen
        made = [each for each in guesses if each.length]
        seen.drafts += len(made)
        seen.drafted += sum(each.length for each in made)
        seen.accepted += sum(each.right for each in made)
        seen.all_wrong += sum(each.right == 0 for each in made)
        seen.all_right += sum(each.right == each.length for each in made)
        seen.beside_others += bool(made) and len(made) < len(plan.rows)
        for row, each in zip(plan.rows, guesses, strict=True):
            if each.length:
                self._fed[row.sequence] += each.right

    def _run(
        self, row: PlanRow, sequence: Sequence, tables: PageTables, guesses: Guesses
    ) -> RowResult:
        """Read the context back, compare it with what it has to be, and go on from there."""
        end = row.slot + len(row.input_ids) - row.begin
        known = self._histories(sequence)
        expected = self._expected(row, sequence, known, 0)
        self._read_segments(row, sequence, tables)
        self._read_units(row, sequence, known)
        for group, window in enumerate(self._windows):
            expected = self._expected(row, sequence, known, group)
            first, count = row.begin // self._size, -(-end // self._size)
            pages = tables[group, row.table_row, first : first + count].tolist()
            slots = [slot for page in pages for slot in self._pages[page]]
            first = 0 if window is None else max(0, row.slot + 1 - window)
            self.seen.passed += first
            read = slots[first:end]
            require(read == expected[first:], "a wrong context is read", row, pages, slots)
            # Behind the row's inputs are its guesses, and those of earlier steps that were wrong.
            behind = min(len(slots), end + guesses.right)
            rest = set(slots[behind:])
            require(
                rest <= {BLANK, refused(sequence)}, "padding holds something", row, pages, slots
            )
        self._advance_state(row, sequence, known)
        tokens = [self._sample(expected[end - 1].history, state) for state in row.samples]
        if guesses.length:
            require(tokens == guesses.tokens[:1], "a guess follows something else", row)
            tokens = guesses.tokens
        scores = [
            score(known[sequence.num_fed + offset], token)
            for offset, token in enumerate(row.score_ids)
        ]
        pooled = None
        if row.pooling is not None:
            fed = slice(sequence.num_fed, sequence.num_fed + len(row.input_ids))
            pooled = pool(known[fed], row.pooling)
        return RowResult(tokens, [None] * len(tokens), scores, pooled, drafted=guesses.length)

    def _expected(
        self, row: PlanRow, sequence: Sequence, known: list[History], group: int
    ) -> list[Slot]:
        """What the slots of a group hold when the row's inputs have been fed."""
        new = range(sequence.num_fed, sequence.num_fed + len(row.input_ids))
        held = [*self._held(sequence, group), *new]
        return [Slot(sequence.token_ids[i], i, known[i]) for i in held]

    def _compact(self, row: PlanRow, sequence: Sequence, tables: PageTables) -> None:
        """Reduce the row's slots as planned, in every group to others."""
        if row.compaction is None:
            return
        self.seen.compacted += 1
        known = histories(sequence.request.profile, sequence.token_ids)
        history = known[sequence.num_fed + len(row.input_ids) - 1]
        count = row.slot + len(row.input_ids)
        for group in self._groups:
            columns = tables[group, row.table_row, : -(-count // self._size)].tolist()
            slots = [slot for page in columns for slot in self._pages[page]][:count]
            kept = HashedSlots.choose(history, group, range(count), row.compaction.slots)
            pages = row.compaction.pages[group].tolist()
            require(not {*pages} & {*columns}, "a compaction fills pages that it reads", row)
            for index, page in enumerate(pages):
                part = kept[index * self._size : (index + 1) * self._size]
                self._pages[page] = [slots[i] for i in part]

    def _code(self, row: PlanRow, tables: PageTables) -> None:
        """Code the row's slots as planned: its first page then stands for all of them."""
        if row.coded is None or row.coded.fills is None:
            return
        self.seen.coded += 1
        unit = row.coded.unit
        require(row.slot + len(row.input_ids) == unit.slots, "a part of a unit is coded", row)
        columns = tables[0, row.table_row, : unit.slots // self._size].tolist()
        fills = row.coded.fills.tolist()
        require(not {*fills} & {*columns}, "a unit fills pages that it reads", row)
        slots = [slot for page in columns for slot in self._pages[page]]
        for page in fills:
            self._pages[page] = [POISON] * self._size
        self._units[fills[0]] = slots

    def _read_units(self, row: PlanRow, sequence: Sequence, known: list[History]) -> None:
        """The units before a row's slots hold what they have to."""
        unit = sequence.request.unit
        require((unit is not None) == (row.coded is not None), "a unit too much or too little", row)
        if unit is None or row.coded is None:
            return
        start, end = sequence.num_fed, sequence.num_fed + len(row.input_ids)
        require(start // unit.slots == (end - 1) // unit.slots, "a unit is overstepped", row)
        require((end % unit.slots == 0) == (row.coded.fills is not None), "coded too late", row)
        count = start // unit.slots
        require(row.coded.pages.shape == (count, unit.pages), "wrong units", row)
        held = [slot for pages in row.coded.pages.tolist() for slot in self._units[pages[0]]]
        tokens = range(count * unit.slots)
        expected = [Slot(sequence.token_ids[i], i, known[i]) for i in tokens]
        require(held == expected, "a wrong unit is read", row, held)

    def _histories(self, sequence: Sequence) -> list[History]:
        """The history after each of its tokens."""
        request = sequence.request
        method = gang_method(request.profile.methods, len(request.sequences))
        if method is None:
            return histories(request.profile, sequence.token_ids)
        prompt = histories(request.profile, request.prompt_token_ids)
        blocks = block_histories(prompt[-1], known_blocks(request.sequences), method)
        return prompt + blocks[sequence.index]

    def _read_segments(self, row: PlanRow, sequence: Sequence, tables: PageTables) -> None:
        """What a member of a gang sees of others is what it has to be, where it has to be."""
        parts = expected_parts(sequence, self._size) if sequence.begin else []
        require(list(row.segments) == [part.segment for part in parts], "other segments", row)
        for part in parts:
            self._read_segment(part, tables)

    def _read_segment(self, part: Part, tables: PageTables) -> None:
        """Read it through the page tables."""
        known, tokens = self._histories(part.owner), part.owner.token_ids
        expected = [Slot(tokens[i], i, known[i]) for i in part.tokens]
        length, first = part.segment.length, part.segment.begin // self._size
        self.seen.seen_by_others += length if first else 0
        for group in self._groups:
            columns = slice(first, first + -(-length // self._size))
            pages = tables[group, part.segment.table_row, columns].tolist()
            slots = [slot for page in pages for slot in self._pages[page]]
            require(slots[:length] == expected, "a wrong segment is read", part, slots)
            failing = part.owner.request.request_id in self.failed_requests
            require(failing or POISON not in slots, "padding is poisoned", part, slots)

    def _held(self, sequence: Sequence, group: int = 0) -> list[int]:
        """The tokens whose slots the sequence has in its own context before the step, in order."""
        if sequence.begin:
            return list(range(len(sequence.request.prompt_token_ids), sequence.num_fed))
        if sequence.request.unit is not None:
            slots = sequence.request.unit.slots
            return list(range(sequence.num_fed // slots * slots, sequence.num_fed))
        schedule = sequence.request.schedule
        if schedule is not None:
            return self._left(sequence, schedule, group)
        sealed, size = sequence.num_sealed, self._size
        kept = list(range(sealed))
        policy = sequence.request.kv_policy
        if policy is not None:
            # It drops the same pages whatever chunks a text came in.
            [dropped] = policy.drop([SealedPages(kept, sealed)])
            kept = [ordinal for ordinal in kept if ordinal not in dropped]
            self.seen.dropped += len(dropped)
        require(sequence.ordinals == kept, "other pages are left", sequence.ordinals, kept)
        slots = [i for ordinal in kept for i in range(ordinal * size, (ordinal + 1) * size)]
        return slots + list(range(sealed * size, sequence.num_fed))

    @staticmethod
    def _left(sequence: Sequence, schedule: CompactionSchedule, group: int) -> list[int]:
        """The tokens that all compactions so far have left, and those since."""
        known = histories(sequence.request.profile, sequence.token_ids)
        held: list[int] = []
        position = 0
        while (due := schedule.next_due(position)) <= sequence.num_fed:
            held += range(position, due)
            held = HashedSlots.choose(known[due - 1], group, held, schedule.budget)
            position = due
        return [*held, *range(position, sequence.num_fed)]

    def _sample(self, history: History, state: SampleState) -> int:
        number = len(state.output_token_ids)
        return draw(history, state.seed, number, state.banned_token_ids, self._vocab)

    # -- what a plan has to be --------------------------------------------------------------

    def _check_plan(self, plan: StepPlan, running: dict[int, Sequence]) -> None:
        limit = self._engine.scheduler.limit
        fed = plan.num_inputs + sum(row.draft_room for row in plan.rows)
        require(plan.num_inputs > 0, "an empty plan")
        require(fed <= limit.tokens, "the budget of inputs is broken", plan)
        require(len(plan.rows) <= limit.rows, "the budget of rows is broken", plan)
        planned = [row.sequence for row in plan.rows]
        require(len(set(planned)) == len(planned), "a sequence has two rows", plan)
        require(len({row.table_row for row in plan.rows}) == len(planned), "rows share a table")
        require(set(planned) <= running.keys(), "a sequence is planned that does not run", plan)
        first = self._engine.scheduler.running.items[0]
        stands = not any(each.number in planned for each in first.together)
        require(not stands, "the first in order stands still", plan)
        singles: set[int] = set()
        for unit in self._engine.scheduler.running:
            feeding = {s.number for s in unit.together if s.num_pending > 0}
            if unit.begin:
                require(feeding & set(planned) in (feeding, set()), "a gang is torn apart", plan)
                singles |= feeding
            elif unit.num_pending == 1:
                singles.add(unit.number)
        if len(singles) < limit.tokens:
            require(singles <= set(planned), "a decode starves", plan)
        targets = [target for _, target in plan.copies] + plan.blank
        require(len(set(targets)) == len(targets), "a page is prepared twice", plan)
        sources = {source for source, _ in plan.copies}
        require(not sources & set(targets), "a page that is copied is overwritten", plan)
        for row in plan.rows:
            self._check_row(row, running[row.sequence])

    def _check_row(self, row: PlanRow, sequence: Sequence) -> None:
        request, state, count = sequence.request, sequence.state, len(row.input_ids)
        start, end = sequence.num_fed, sequence.num_fed + count
        require(row.begin == sequence.begin, "a wrong beginning", row)
        require(row.slot - row.begin == len(self._held(sequence)), "a wrong slot", row)
        require(
            not any(start < boundary < end for boundary in request.boundaries),
            "a boundary is crossed",
            row,
        )
        self._check_compaction(row, sequence, start, end)
        ended = sequence.status is Status.FINISHED and request.gang is not None
        self.seen.kept += ended and row.begin > 0
        status = Status.FINISHED if ended else Status.RUNNING
        require(sequence.status is status, "a planned sequence does not run", row)
        ends = [end for m in row.methods for end in m.boundaries(len(request.prompt_token_ids))]
        require(not any(start < place < end for place in ends), "a method is not obeyed", row)
        require(count > 0, "an empty row", row)
        require(row.table_row == sequence.table_row, "a wrong table row", row)
        known = expected_tokens(sequence, self.beginnings.get(request.request_id, ()))
        require(sequence.token_ids == known, "tokens are lost", known, sequence.token_ids)
        require(list(row.input_ids) == known[start:end], "wrong inputs", row, known)
        require(row.positions == range(start, end), "wrong positions", row)
        require(row.pooling == request.pooling, "wrong pooling", row)
        require(row.adapter == request.profile.adapter, "a wrong adapter", row)
        require(row.methods == request.profile.methods, "wrong methods", row)
        quiet = sum(i < len(request.prompt_token_ids) - 1 for i in range(start, end))
        begins = self._fed.get(sequence.number) != start and sequence.num_adopted >= 0
        # One that was preempted may have found in the cache all that it had fed before.
        again = row.first and request.metrics.num_preemptions > 0
        require(row.first == begins or again, "a row is not what it begins as", row)
        require(row.num_quiet == quiet, "wrong inputs count as drawn from", row)
        of_prompt = sum(i < len(request.prompt_token_ids) for i in range(start, end))
        require(row.num_prompt == of_prompt, "wrong inputs count as the prompt's", row)
        require(
            row.ends_prompt == (start < len(request.prompt_token_ids) <= end),
            "the prompt ends elsewhere",
            row,
        )
        whole = start == 0 and end == len(known)
        require(self._causal or whole, "a part of a prompt", row)
        samples = []
        if end == len(known) and request.max_tokens > 0 and not ended:
            together = sequence.index == 0 and not state.output_token_ids and not row.begin
            samples = request.sequences if together else [sequence]
        require(
            [id(s) for s in row.samples] == [id(s.state) for s in samples], "wrong samples", row
        )
        if row.draft_room:
            drafting = request.drafting
            require(drafting is not None, "a request is guessed for that wants none", row)
            assert drafting is not None
            require(0 < row.draft_room <= drafting.most_drafted, "too much room", row)
            require(count == len(row.samples) == 1, "room where nothing is drawn", row)
            left = request.max_tokens - len(state.output_token_ids)
            require(bool(state.output_token_ids) and row.draft_room < left, "wrong room", row)
        if request.num_unscored == 0:
            require(not row.score_ids, "the prompt is scored again", row)
        else:
            prompt = request.prompt_token_ids
            missing = len(prompt) - request.num_unscored
            wanted = prompt[start + 1 : end + 1] if end >= missing else []
            require(list(row.score_ids) == wanted, "wrong scores", row)
        self._note_fed(row, sequence)

    @staticmethod
    def _check_compaction(row: PlanRow, sequence: Sequence, start: int, end: int) -> None:
        schedule, policy = sequence.request.schedule, sequence.request.slot_policy
        if schedule is None:
            require(row.compaction is None and row.observer is None, "a policy too much", row)
            return
        require(end <= schedule.next_stop(start), "a step goes beyond a compaction", row)
        require(row.observer == (policy if schedule.observes(start) else None), "unobserved", row)
        require((row.compaction is not None) == schedule.is_due(end), "no compaction is due", row)
        if row.compaction is not None:
            require(row.compaction.slots == schedule.budget, "a wrong number of slots", row)

    def _note_fed(self, row: PlanRow, sequence: Sequence) -> None:
        """A token is fed twice only by a sequence that lost its pages in between."""
        if row.sequence in self._fed and self._fed[row.sequence] != sequence.num_fed:
            self.seen.resumed += 1
            request = sequence.request
            resumed = self._resumed[request.request_id] = (
                self._resumed.get(request.request_id, 0) + 1
            )
            lost = request.metrics.num_preemptions * len(sequence.together)
            require(resumed <= lost, "tokens are fed again without need", row)
        elif row.sequence not in self._fed and sequence.compacted is not None:
            self.seen.compacted_hits += sequence.index == 0
        elif row.sequence not in self._fed and sequence.index > 0:
            self.seen.late_forks += sequence.num_fed < len(sequence.request.prompt_token_ids)
        self._fed[row.sequence] = sequence.num_fed + len(row.input_ids)

    def _count(self, plan: StepPlan) -> None:
        seen, lengths = self.seen, [len(row.input_ids) for row in plan.rows]
        seen.steps += 1
        seen.rows += len(plan.rows)
        seen.inputs += plan.num_inputs
        seen.copies += len(plan.copies)
        seen.blanks += len(plan.blank)
        seen.chunks += sum(
            not (row.samples or row.begin)
            and row.positions.start + length < len(self._known(row.sequence))
            for row, length in zip(plan.rows, lengths, strict=True)
        )
        seen.mixed += len(lengths) > 1 and min(lengths) == 1 < max(lengths)
        seen.forks += sum(len(row.samples) > 1 for row in plan.rows)

    def _known(self, number: int) -> list[int]:
        return next(s for s in self._engine.scheduler.holders if s.number == number).token_ids
