"""Who holds which KV pages: reservation, copy-on-write, sealing, sharing, page tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from headrace.contracts.cache import CacheLayout
from headrace.contracts.kv_policy import KVPolicy, SealedPages
from headrace.contracts.step import PageTables, StepPlan
from headrace.engine.page_pool import PagePool
from headrace.engine.prefix_tree import PrefixTree, SealedRun
from headrace.engine.sequence import Sequence


class CacheAccounting:
    """Pages of all sequences, and the page tables that the runner reads.

    Args:
        layout: block size and cache groups.
        num_pages: pages of the arena.
        num_rows: sequences that can hold pages at once (rows of the tables).
        max_slots: slots of one sequence at most.
        share_prefixes: keep sealed runs in the prefix tree.
        policy: decides which sealed runs a sequence keeps; all if ``None``. What was computed
            without a part of its past is never shared.
        chunk: inputs of one step at most, which may be sealed before the policy is asked.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        num_rows: int,
        max_slots: int,
        share_prefixes: bool,
        policy: KVPolicy | None = None,
        chunk: int = 0,
    ) -> None:
        self.layout = layout
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(layout.block_size)
        self._share = share_prefixes and policy is None
        self._policy = policy
        self._chunk_pages = layout.pages_for(chunk)
        self._groups = range(len(layout.groups))
        shape = (len(layout.groups), num_rows, layout.pages_for(max_slots))
        self.tables: PageTables = np.zeros(shape, dtype=np.int32)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_available(self) -> int:
        """Pages that are free or could be, by evicting idle runs."""
        return self.pool.num_free + self.num_cached

    @property
    def num_cached(self) -> int:
        """Pages that only the prefix tree keeps."""
        return self.tree.num_idle * len(self._groups)

    @property
    def num_free_rows(self) -> int:
        """Sequences that could be admitted as far as table rows go."""
        return len(self._free_rows)

    def match(self, sequence: Sequence) -> list[SealedRun]:
        """Sealed runs that hold a beginning of the sequence's tokens.

        At least one token stays pending, since logits need an input; a request that wants the
        log-probabilities of its prompt has to compute it.
        """
        if not self._share or sequence.request.num_unscored:
            return []
        limit = (len(sequence.token_ids) - 1) // self.layout.block_size
        return self.tree.match(sequence.request.profile, sequence.token_ids, limit)

    def pages_to_admit(self, sequence: Sequence, runs: list[SealedRun]) -> int:
        """Pages that must be available to adopt ``runs`` and hold all known tokens."""
        known = self.layout.pages_for(len(sequence.token_ids))
        if self._policy is not None:
            known = min(known, self._policy.most_pages(known) + self._chunk_pages + 1)
        idle = sum(run.users == 0 for run in runs)
        return (known - len(runs) + idle) * len(self._groups)

    def admit(self, sequence: Sequence, runs: list[SealedRun]) -> None:
        """Give a waiting sequence a table row and the runs that ``match`` found."""
        sequence.table_row = self._free_rows.pop()
        sequence.tail = [[] for _ in self._groups]
        for run in runs:
            self._append_run(sequence, run)
        slots = len(runs) * self.layout.block_size
        sequence.num_fed = sequence.num_slots = sequence.next_position = slots

    def _append_run(self, sequence: Sequence, run: SealedRun) -> None:
        self.tree.hold(run)
        self.tables[:, sequence.table_row, len(sequence.runs)] = run.pages
        sequence.runs.append(run)
        sequence.ordinals.append(sequence.num_sealed)
        sequence.num_sealed += 1

    def reserve(self, sequence: Sequence, count: int, plan: StepPlan) -> int:
        """Make up to ``count`` slots after the sequence's last writable; return how many.

        0 means that not one more slot can be had. Copies and blanks go into ``plan``.
        """
        size, groups = self.layout.block_size, len(self._groups)
        owned = len(sequence.runs) + len(sequence.tail[0])
        room = owned * size - sequence.num_slots
        shared = room > 0 and any(self.pool.references[tail[-1]] > 1 for tail in sequence.tail)
        if room >= count and not shared:
            return count
        affordable = self.num_available // groups - shared
        if affordable < 0:
            return 0
        count = min(count, room + affordable * size)
        if count == 0:
            return 0
        if shared:
            self._copy_on_write(sequence, plan)
        new = self.layout.pages_for(sequence.num_slots + count) - owned
        partly_filled = (sequence.num_slots + count) % size != 0
        if new > 0:
            for group, pages in enumerate(self._take_columns(new)):
                sequence.tail[group] += pages
                self.tables[group, sequence.table_row, owned : owned + new] = pages
                if partly_filled:
                    plan.blank.append(pages[-1])
        return count

    def _take_columns(self, count: int) -> list[list[int]]:
        """``count`` pages for each group, evicting idle runs as far as needed."""
        wanted = count * len(self._groups)
        while self.pool.num_free < wanted:
            for page in self.tree.evict().pages:
                self.pool.release(page)
        return [self.pool.allocate(count) for _ in self._groups]

    def _copy_on_write(self, sequence: Sequence, plan: StepPlan) -> None:
        """Replace the last, partly filled page by a copy that the sequence alone holds."""
        last = len(sequence.runs) + len(sequence.tail[0]) - 1
        for group, (page,) in enumerate(self._take_columns(1)):
            tail = sequence.tail[group]
            plan.copies.append((tail[-1], page))
            self.pool.release(tail[-1])
            tail[-1] = page
            self.tables[group, sequence.table_row, last] = page

    def seal(self, sequence: Sequence) -> None:
        """Turn the pages of the tail that are full into runs.

        Where the tree has the same run already, the sequence adopts that one and its own pages
        are free.
        """
        size = self.layout.block_size
        while (len(sequence.runs) + 1) * size <= sequence.num_slots:
            pages = tuple(tail.pop(0) for tail in sequence.tail)
            start = sequence.num_sealed * size
            key = tuple(sequence.token_ids[start : start + size])
            if self._share:
                parent = (
                    sequence.runs[-1] if sequence.runs else self.tree.root(sequence.request.profile)
                )
                run = self.tree.insert(parent, key, pages)
            else:
                run = SealedRun(pages, key, None)
            self._append_run(sequence, run)
            if run.pages != pages:
                for page in pages:
                    self.pool.release(page)

    def shrink(self, sequences: list[Sequence]) -> None:
        """Let the policy free sealed pages of sequences that have sealed some."""
        if self._policy is None:
            return
        views = [SealedPages(s.ordinals, s.num_sealed) for s in sequences]
        for sequence, dropped in zip(sequences, self._policy.drop(views), strict=True):
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
            if self.tree.drop(run):
                for page in run.pages:
                    self.pool.release(page)
        sequence.ordinals = [ordinal for ordinal, _ in kept]
        sequence.runs = [run for _, run in kept]
        for group, tail in enumerate(sequence.tail):
            pages = [run.pages[group] for run in sequence.runs] + tail
            self.tables[group, sequence.table_row, : len(pages)] = pages

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` share every page of ``parent``; writers copy the last one later."""
        child.table_row = self._free_rows.pop()
        self.tables[:, child.table_row] = self.tables[:, parent.table_row]
        for run in parent.runs:
            self.tree.hold(run)
        for pages in parent.tail:
            for page in pages:
                self.pool.retain(page)
        child.runs = list(parent.runs)
        child.ordinals = list(parent.ordinals)
        child.num_sealed = parent.num_sealed
        child.tail = [list(pages) for pages in parent.tail]
        child.num_fed = parent.num_fed
        child.num_slots = parent.num_slots
        child.next_position = parent.next_position

    def release(self, sequence: Sequence) -> None:
        """Take back everything the sequence holds; its sealed runs stay in the tree, idle."""
        for pages in sequence.tail:
            for page in pages:
                self.pool.release(page)
        for run in reversed(sequence.runs):
            if self.tree.drop(run):
                for page in run.pages:
                    self.pool.release(page)
        self._free_rows.append(sequence.table_row)
        sequence.table_row = -1
        sequence.forget_cache()

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Prove the accounting from the sequences that hold pages. Raises AssertionError."""
        holders = list(holders)
        users: dict[SealedRun, int] = {}
        expected = [0] * self.pool.num_pages
        rows: set[int] = set()
        for sequence in holders:
            rows.add(sequence.table_row)
            if len(sequence.ordinals) != len(sequence.runs):
                raise AssertionError(f"sequence {sequence.number}: its runs are not numbered")
            for run in sequence.runs:
                users[run] = users.get(run, 0) + 1
            for group, pages in enumerate(sequence.tail):
                for page in pages:
                    expected[page] += 1
                table = [run.pages[group] for run in sequence.runs] + pages
                actual = self.tables[group, sequence.table_row, : len(table)].tolist()
                if actual != table:
                    raise AssertionError(f"sequence {sequence.number}: its table row is wrong")
                if len(table) != self.layout.pages_for(sequence.num_slots):
                    raise AssertionError(f"sequence {sequence.number} holds {len(table)} pages")
        for run in {*users, *self.tree.runs()}:
            for page in run.pages:
                expected[page] += 1
        if len(rows) != len(holders) or rows & set(self._free_rows):
            raise AssertionError("two sequences share a table row")
        if len(rows) + len(self._free_rows) != self.tables.shape[1]:
            raise AssertionError("a table row leaked")
        self.pool.check_integrity(expected)
        self.tree.check_integrity(users)
