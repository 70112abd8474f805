"""Who holds which KV pages: reservation, copy-on-write, sealing, sharing, page tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from headrace.contracts.cache import CacheLayout
from headrace.contracts.kv_policy import KVPolicy, SealedPages
from headrace.contracts.step import PageTables, StepPlan
from headrace.engine.gang import Gang
from headrace.engine.page_pool import PagePool
from headrace.engine.prefix_tree import PrefixTree, SealedRun
from headrace.engine.sequence import Request, Sequence
from headrace.engine.stage_pages import StagePages


class CacheAccounting:
    """Pages of all sequences, and the page tables that the runner reads.

    Args:
        layout: block size and cache groups.
        num_pages: pages of the arena.
        num_rows: sequences that can hold pages at once (rows of the tables).
        max_slots: slots of one sequence at most.
        share_prefixes: keep sealed runs in the prefix tree. The layout must have no states: they
            are known only at a sequence's end.
        chunk: inputs of one step at most, which may be sealed before pages are freed.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        num_rows: int,
        max_slots: int,
        share_prefixes: bool,
        chunk: int = 0,
    ) -> None:
        self.layout = layout
        self.pool = PagePool(num_pages)
        windowed = [group.window is not None for group in layout.groups]
        self.tree = PrefixTree(layout.block_size, windowed)
        self._share = share_prefixes
        self._chunk = chunk
        self._columns_in_window = layout.columns_in_window(chunk)
        self._windowed = np.flatnonzero(windowed)
        self._window = layout.window
        self._num_groups = len(layout.groups)
        self._state_copies: list[tuple[int, int]] = []
        shape = (len(layout.groups), num_rows, layout.pages_for(max_slots))
        self.tables: PageTables = np.zeros(shape, dtype=np.int32)
        self.staged = StagePages(layout, self.pool, self.tables, self._take_pages)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_available(self) -> int:
        """Pages that are free or could be, by evicting idle runs."""
        return self.pool.num_free + self.num_cached

    @property
    def num_cached(self) -> int:
        """Pages that only the prefix tree keeps."""
        return self.tree.num_idle_pages

    @property
    def num_free_rows(self) -> int:
        """Sequences that could be admitted as far as table rows go."""
        return len(self._free_rows)

    def match(self, sequence: Sequence) -> list[SealedRun]:
        """Sealed runs that hold a beginning of the sequence's tokens.

        At least one token stays pending, since logits need an input; a request that wants the
        log-probabilities of its prompt has to compute it.
        """
        request = sequence.request
        if not self._share or request.needs_all_inputs:
            return []
        known = len(sequence.token_ids if request.gang is None else request.prompt_token_ids)
        known = min(known - 1, request.num_shareable)
        limit = known // self.layout.block_size
        if request.schedule is not None:
            return self.tree.match_compacted(
                request.cache_profile, sequence.token_ids, known, request.schedule
            )
        if request.units:
            slots = request.units[0].slots
            return self.tree.match_units(request.cache_profile, sequence.token_ids, known, slots)
        runs = self.tree.match(request.cache_profile, sequence.token_ids, limit)
        return runs if self.layout.window is None else runs[: self._readable(runs)]

    def _readable(self, runs: list[SealedRun]) -> int:
        """How many of the runs can be adopted: behind the last, all in the window are there."""
        readable, unbroken = 0, 0
        for count, run in enumerate(runs, 1):
            unbroken = unbroken + 1 if run.has_window else 0
            if count - self._first_in_window(count * self.layout.block_size) <= unbroken:
                readable = count
        return readable

    def _first_in_window(self, slots: int) -> int:
        """Of a sequence of ``slots`` slots, the first page that its next query may read."""
        if self._window is None:
            return 0
        return max(0, slots + 1 - self._window) // self.layout.block_size

    def pages_to_admit(self, sequence: Sequence, runs: list[SealedRun]) -> int:
        """Pages that must be available to adopt ``runs`` and hold all known tokens."""
        most = self.pages_at_once(sequence.request, len(sequence.token_ids))
        if most is not None:
            idle = sum(len(run.pages) for run in runs if run.users == 0)
            held = sum(len(run.pages) for run in runs)
            return most - held + idle
        gang = sequence.request.gang
        if gang is None:
            new = self.layout.pages_for(len(sequence.token_ids)) - len(runs)
        else:
            new = gang.num_columns(self.layout) - len(runs)
        policy = sequence.request.kv_policy
        if policy is not None:
            most = policy.most_pages(new) + self.layout.pages_for(self._chunk) + 1
            new = min(new, most)
        windows = len(self._windowed)
        lasting = new + sum(run.users == 0 for run in runs)
        needed = lasting * (self._num_groups - windows)
        if self._columns_in_window is not None:
            readable = runs[self._first_in_window(len(runs) * self.layout.block_size) :]
            passing = new + sum(run.window_users == 0 for run in readable)
            needed += min(passing, self._columns_in_window) * windows
        return needed

    def pages_at_once(self, request: Request, tokens: int) -> int | None:
        """Pages that a sequence of so many tokens has at most at once, where slots are reduced,
        coded or never there; ``None``: where they are not.
        """
        if request.stages is not None:
            return self.staged.pages_at_once(request, tokens)
        if request.schedule is not None:
            slots = request.schedule.most_slots(tokens)
            return self.layout.pages_for(slots) * self._num_groups
        if request.units:
            unit, pages = request.units[0].slots, sum(unit.pages for unit in request.units)
            own = self.layout.pages_for(min(tokens, unit)) * self._num_groups
            return tokens // unit * pages + own + self._num_groups - 1
        return None

    def admit(self, sequence: Sequence, runs: list[SealedRun]) -> None:
        """Give a waiting sequence a table row and the runs that ``match`` found."""
        self.take_row(sequence)
        sequence.tail = []
        if sequence.request.stages is not None:
            self.staged.begin(sequence)
        if runs and sequence.request.units:
            self._hold_units(sequence, runs)
            sequence.num_fed = sequence.next_position = sequence.num_adopted = runs[-1].tokens
            return
        if runs and runs[-1].tokens:
            self._hold_compacted(sequence, runs[-1])
            sequence.num_fed = sequence.next_position = sequence.num_adopted = runs[-1].tokens
            return
        slots = len(runs) * self.layout.block_size
        sequence.num_passed = self._first_in_window(slots)
        for index, run in enumerate(runs):
            self._append_run(sequence, run, index >= sequence.num_passed)
        sequence.num_fed = sequence.num_slots = sequence.next_position = slots
        sequence.num_adopted = slots

    def take_row(self, sequence: Sequence) -> None:
        """Give a sequence that has no pages yet a table row."""
        sequence.table_row = self._free_rows.pop()

    def _append_run(self, sequence: Sequence, run: SealedRun, in_window: bool = True) -> None:
        self.tree.hold(run)
        self.tables[:, sequence.table_row, len(sequence.runs)] = run.pages
        if in_window:
            self.tree.hold_window(run)
        else:
            self.tables[self._windowed, sequence.table_row, len(sequence.runs)] = 0
        sequence.runs.append(run)
        sequence.ordinals.append(sequence.num_sealed)
        sequence.num_sealed += 1

    def _hold_compacted(self, sequence: Sequence, run: SealedRun) -> None:
        """Let a run be all that the sequence has."""
        self.tree.hold(run)
        sequence.compacted = run
        columns = self._columns_of(run)
        sequence.num_slots = len(columns) * self.layout.block_size
        self.tables[:, sequence.table_row, : len(columns)] = np.transpose(columns)

    def _hold_units(self, sequence: Sequence, units: Iterable[SealedRun]) -> None:
        """Let a sequence begin with units, behind which it has no slots yet."""
        for unit in units:
            self.tree.hold(unit)
            sequence.units.append(unit)

    def _columns_of(self, run: SealedRun | None) -> list[list[int]]:
        """The pages of a compacted run, one for each group at a time."""
        if run is None:
            return []
        groups = self._num_groups
        return [list(run.pages[i : i + groups]) for i in range(0, len(run.pages), groups)]

    def _held_columns(self, sequence: Sequence) -> list[list[int]]:
        """All pages of a sequence in the order of its slots, one for each group at a time."""
        runs = [list(run.pages) for run in sequence.runs]
        return [*self._columns_of(sequence.compacted), *runs, *sequence.tail]

    def _num_columns(self, sequence: Sequence) -> int:
        compacted = sequence.compacted
        count = 0 if compacted is None else len(compacted.pages) // self._num_groups
        return count + len(sequence.runs) + len(sequence.tail)

    def _columns_to_fill(self, sequence: Sequence, count: int) -> int:
        """Columns that are filled if the step ends with a compaction or a coded unit."""
        schedule, units = sequence.request.schedule, sequence.request.units
        if units:
            full = sequence.num_slots + count == units[0].slots
            return -(-sum(unit.pages for unit in units) // self._num_groups) if full else 0
        if schedule is None or not schedule.is_due(sequence.num_fed + count):
            return 0
        return self.layout.pages_for(schedule.budget)

    def reserve(self, sequence: Sequence, count: int, plan: StepPlan) -> int:
        """Make up to ``count`` slots after the sequence's last writable; return how many.

        0 means that not one more slot can be had. Copies and blanks go into ``plan``.
        """
        size, groups = self.layout.block_size, self._num_groups
        if groups == 0:
            return count
        if sequence.groups:
            return self.staged.reserve(sequence, count, plan, self.num_available)
        owned = self._num_columns(sequence)
        room = owned * size - sequence.num_slots
        shared = room > 0 and any(self.pool.references[page] > 1 for page in sequence.tail[-1])
        filled = self._columns_to_fill(sequence, count)
        if room >= count and not shared and not filled:
            return count
        affordable = self.num_available // groups - shared
        if filled and room + (affordable - filled) * size < count:
            count, filled = count - 1, 0
        if affordable < filled:
            return 0
        count = min(count, room + (affordable - filled) * size)
        if count == 0:
            return 0
        if shared:
            self._copy_on_write(sequence, plan)
        new = self.layout.pages_for(sequence.num_slots + count) - owned
        if new > 0:
            columns = self._take_columns(new)
            sequence.tail += columns
            self.tables[:, sequence.table_row, owned : owned + new] = np.transpose(columns)
            if (sequence.num_slots + count) % size != 0:
                plan.blank += columns[-1]
        sequence.spare = self._take_columns(filled)
        return count

    def reserve_draft(self, sequence: Sequence, count: int, plan: StepPlan) -> int:
        """Make up to ``count`` slots more, behind one that is reserved; return how many.

        They may come to nothing: all new pages are blanked, and ``trim`` takes back what is left.
        """
        columns, blanks = len(sequence.tail), len(plan.blank)
        made = self.reserve(sequence, 1 + count, plan) - 1
        plan.blank[blanks:] = [page for column in sequence.tail[columns:] for page in column]
        return made

    def trim(self, sequence: Sequence) -> None:
        """Take back pages behind the sequence's last slot."""
        kept = self.layout.pages_for(sequence.num_slots) - len(sequence.runs)
        for column in sequence.tail[kept:]:
            self._release_pages(column)
        del sequence.tail[kept:]

    def _take_columns(self, count: int) -> list[list[int]]:
        """``count`` times a page for each group."""
        pages = self._take_pages(count * self._num_groups)
        return [pages[start::count] for start in range(count)]

    def _take_pages(self, wanted: int) -> list[int]:
        """Pages, evicting what is idle as far as needed."""
        while self.pool.num_free < wanted:
            self._release_pages(self.tree.evict())
        return self.pool.allocate(wanted)

    def _release_pages(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pool.release(page)

    def _copy_on_write(self, sequence: Sequence, plan: StepPlan) -> None:
        """Replace the last, partly filled column by a copy that the sequence alone holds."""
        last = self._num_columns(sequence) - 1
        (column,) = self._take_columns(1)
        plan.copies += zip(sequence.tail[-1], column, strict=True)
        self._release_pages(sequence.tail[-1])
        sequence.tail[-1] = column
        self.tables[:, sequence.table_row, last] = column

    def seal(self, sequence: Sequence) -> None:
        """Turn the pages of the tail that are full into runs.

        Where the tree has the same run already, the sequence adopts that one and its own pages
        are free.
        """
        size = self.layout.block_size
        if sequence.groups:
            self.staged.advance(sequence)
            return
        if sequence.request.units:
            self._code(sequence)
            return
        if sequence.compacted is not None:
            self._compact(sequence)
            return
        while (len(sequence.runs) + 1) * size <= sequence.num_slots:
            pages = tuple(sequence.tail.pop(0)) if self._num_groups else ()
            start = sequence.num_sealed * size
            key = tuple(sequence.token_ids[start : start + size])
            request, runs = sequence.request, sequence.runs
            if self._share and start + size <= request.num_shareable:
                parent = runs[-1] if runs else self.tree.root(request.cache_profile)
                run, spare = self.tree.insert(parent, key, pages)
            else:
                run, spare = self.tree.new_run(pages, key), []
            self._append_run(sequence, run)
            self._release_pages(spare)
        self._pass(sequence)
        self._compact(sequence)

    def _compact(self, sequence: Sequence) -> None:
        """If the step ended with a compaction, hold what it left, and nothing else."""
        if not sequence.spare:
            return
        request, fed = sequence.request, sequence.num_fed
        pages = tuple(page for column in sequence.spare for page in column)
        parent, key = sequence.compacted, tuple[int, ...]()
        if parent is None:
            parent = sequence.runs[-1]
        else:
            key = tuple(sequence.token_ids[parent.tokens : fed])
        if self._share and fed <= request.num_shareable:
            run, unused = self.tree.insert(parent, key, pages, fed)
        else:
            run, unused = self.tree.new_run(pages, key, fed), []
        before = sequence.compacted
        self._hold_compacted(sequence, run)
        self._release_pages(unused)
        for column in sequence.tail:
            self._release_pages(column)
        for old in [*reversed(sequence.runs), *([before] if before else [])]:
            self._release_pages(self.tree.drop_window(old))
            self._release_pages(self.tree.drop(old))
        sequence.runs, sequence.ordinals, sequence.tail, sequence.spare = [], [], [], []

    def _code(self, sequence: Sequence) -> None:
        """If the step ended with a coded unit, hold it in place of the slots."""
        if not sequence.spare:
            return
        request, end = sequence.request, sequence.num_fed
        taken = [page for column in sequence.spare for page in column]
        count = sum(unit.pages for unit in request.units)
        pages = tuple(taken[:count])
        key = tuple(sequence.token_ids[end - sequence.num_slots : end])
        if self._share and end <= request.num_shareable:
            parent = sequence.units[-1] if sequence.units else self.tree.root(request.cache_profile)
            run, unused = self.tree.insert(parent, key, pages, end)
        else:
            run, unused = self.tree.new_run(pages, key, end), []
        self._hold_units(sequence, [run])
        self._release_pages([*unused, *taken[count:]])
        for column in sequence.tail:
            self._release_pages(column)
        sequence.tail, sequence.spare, sequence.num_slots = [], [], 0

    def _pass(self, sequence: Sequence) -> None:
        """Let go of pages that the sequence has behind its window."""
        if self._window is None:
            return
        first = min(self._first_in_window(sequence.num_slots), len(sequence.runs))
        for index in range(sequence.num_passed, first):
            self._release_pages(self.tree.drop_window(sequence.runs[index]))
            self.tables[self._windowed, sequence.table_row, index] = 0
        sequence.num_passed = max(sequence.num_passed, first)

    def shrink(self, sequences: list[Sequence]) -> None:
        """Let policies free sealed pages of sequences that have sealed some."""
        by_policy: dict[KVPolicy, list[Sequence]] = {}
        for sequence in sequences:
            if sequence.request.kv_policy is not None:
                by_policy.setdefault(sequence.request.kv_policy, []).append(sequence)
        for policy, theirs in by_policy.items():
            views = [SealedPages(s.ordinals, s.num_sealed) for s in theirs]
            for sequence, dropped in zip(theirs, policy.drop(views), strict=True):
                if dropped:
                    self._drop(sequence, set(dropped))

    def _drop(self, sequence: Sequence, ordinals: set[int]) -> None:
        """Free the runs with these ordinals; what follows moves up in the tables."""
        kept = []
        for ordinal, run in zip(sequence.ordinals, sequence.runs, strict=True):
            if ordinal not in ordinals:
                kept.append((ordinal, run))
                continue
            sequence.num_slots -= self.layout.block_size
            self._release_pages(self.tree.drop(run))
        sequence.ordinals = [ordinal for ordinal, _ in kept]
        sequence.runs = [run for _, run in kept]
        columns = [*(run.pages for run in sequence.runs), *sequence.tail]
        if columns:
            self.tables[:, sequence.table_row, : len(columns)] = np.transpose(columns)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` share every page of ``parent``; writers copy the last one later."""
        self.take_row(child)
        self._adopt(parent, child)

    def part(self, gang: Gang) -> None:
        """Let all members share the leader's pages, and begin blocks of their own behind them.

        They begin new pages, so that what others see of them begins one.
        """
        leader = gang.leader
        for member in gang.members[1:]:
            self._adopt(leader, member)
        begin = self.layout.pages_for(leader.num_slots) * self.layout.block_size
        for member in gang.members:
            member.begin = member.num_slots = begin

    def has_slots(self, sequences: Iterable[Sequence]) -> bool:
        """Whether ``reserve`` would make one slot writable for each of a gang."""
        size = self.layout.block_size
        full = sum(s.num_slots == size * (len(s.runs) + len(s.tail)) for s in sequences)
        return full * self._num_groups <= self.num_available

    def _adopt(self, parent: Sequence, child: Sequence) -> None:
        self.tables[:, child.table_row] = self.tables[:, parent.table_row]
        for index, run in enumerate(parent.runs):
            self.tree.hold(run)
            if index >= parent.num_passed:
                self.tree.hold_window(run)
        for column in parent.tail:
            for page in column:
                self.pool.retain(page)
        if parent.compacted is not None:
            self.tree.hold(parent.compacted)
            child.compacted = parent.compacted
        self._hold_units(child, parent.units)
        self.staged.adopt(parent, child)
        if self.layout.all_states or parent.request.slot_policy is not None:
            self._state_copies.append((parent.table_row, child.table_row))
        child.runs = list(parent.runs)
        child.ordinals = list(parent.ordinals)
        child.num_sealed, child.num_passed = parent.num_sealed, parent.num_passed
        child.tail = [list(column) for column in parent.tail]
        child.num_fed, child.num_adopted = parent.num_fed, -1
        child.num_slots = parent.num_slots
        child.next_position = parent.next_position

    def take_state_copies(self) -> list[tuple[int, int]]:
        """(source, target) table rows whose states have to be copied before the next step."""
        copies, self._state_copies = self._state_copies, []
        return copies

    def return_state_copies(self, copies: list[tuple[int, int]]) -> None:
        """Those of a step that failed, and that may have executed them or not.

        Of sequences that were in the step none is left, and states of the others are as before.
        """
        self._state_copies[:0] = copies

    def release(self, sequence: Sequence) -> None:
        """Take back everything the sequence holds; its sealed runs stay in the tree, idle."""
        self.staged.release(sequence)
        for column in [*sequence.tail, *sequence.spare]:
            self._release_pages(column)
        if sequence.compacted is not None:
            self._release_pages(self.tree.drop(sequence.compacted))
        for unit in reversed(sequence.units):
            self._release_pages(self.tree.drop(unit))
        for index in range(len(sequence.runs) - 1, -1, -1):
            run = sequence.runs[index]
            if index >= sequence.num_passed:
                self._release_pages(self.tree.drop_window(run))
            self._release_pages(self.tree.drop(run))
        self._free_rows.append(sequence.table_row)
        sequence.table_row = -1
        sequence.forget_cache()

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Prove the accounting from the sequences that hold pages. Raises AssertionError."""
        holders = list(holders)
        users: dict[SealedRun, int] = {}
        window_users: dict[SealedRun, int] = {}
        expected = [0] * self.pool.num_pages
        rows: set[int] = set()
        for sequence in holders:
            rows.add(sequence.table_row)
            self._check_sequence(sequence)
            for index, run in enumerate(sequence.runs):
                users[run] = users.get(run, 0) + 1
                if self.layout.window is not None and index >= sequence.num_passed:
                    window_users[run] = window_users.get(run, 0) + 1
            for run in [*sequence.units, *([sequence.compacted] if sequence.compacted else [])]:
                users[run] = users.get(run, 0) + 1
            held = (group.pages for group in sequence.groups)
            for column in [*sequence.tail, *sequence.spare, *held]:
                for page in column:
                    expected[page] += 1
        for run in {*users, *self.tree.runs()}:
            for page in self.tree.pages_of(run):
                expected[page] += 1
        if len(rows) != len(holders) or rows & set(self._free_rows):
            raise AssertionError("two sequences share a table row")
        if len(rows) + len(self._free_rows) != self.tables.shape[1]:
            raise AssertionError("a table row leaked")
        self.pool.check_integrity(expected)
        self.tree.check_integrity(users, window_users)

    def _check_sequence(self, sequence: Sequence) -> None:
        """Its runs, tail and table row agree."""
        if sequence.groups:
            self.staged.check(sequence)
            return
        name = f"sequence {sequence.number}"
        if len(sequence.ordinals) != len(sequence.runs):
            raise AssertionError(f"{name}: its runs are not numbered")
        held = self._held_columns(sequence)
        for column in held[: sequence.num_passed]:
            for group in self._windowed.tolist():
                column[group] = 0
        if self._num_groups and len(held) != self.layout.pages_for(sequence.num_slots):
            raise AssertionError(f"{name} holds {len(held)} columns of pages")
        actual = self.tables[:, sequence.table_row, : len(held)].T.tolist()
        if actual != held:
            raise AssertionError(f"{name}: its table row is wrong")
        first = self._first_in_window(sequence.num_slots)
        if sequence.num_passed != min(first, len(sequence.runs)):
            raise AssertionError(f"{name}: {sequence.num_passed} pages passed its window")
