"""Pages of sequences that have other slots in the layers of one stage than in another's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.contracts.cache import CacheLayout
from headrace.contracts.step import PageTables, StepPlan
from headrace.engine.page_pool import PagePool

if TYPE_CHECKING:
    from headrace.engine.sequence import Request, Sequence


@dataclass(slots=True)
class GroupPages:
    """What a sequence holds in one cache group.

    Args:
        slots: its own, in ``tail``, one page after another; those of ``units`` are not counted.
        units: pages of each coded unit, in order.
        fills: pages of the units that its first slots become when the step ends.
    """

    slots: int = 0
    tail: list[int] = field(default_factory=list)
    units: list[list[int]] = field(default_factory=list)
    fills: list[list[int]] = field(default_factory=list)

    @property
    def pages(self) -> list[int]:
        """All of them."""
        return [*self.tail, *(page for unit in (*self.units, *self.fills) for page in unit)]


@dataclass(frozen=True, slots=True)
class _Growth:
    """What a group takes for some more slots: pages behind the last, and pages of units."""

    slots: int
    tail: int
    units: int
    unit_pages: int
    copies: bool

    @property
    def pages(self) -> int:
        return self.tail + self.units * self.unit_pages + self.copies


class StagePages:
    """Reserves and returns their pages. None of these is sealed or found in the prefix tree.

    Args:
        pool, tables: of all sequences.
        take: makes so many pages available, and takes them.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pool: PagePool,
        tables: PageTables,
        take: Callable[[int], list[int]],
    ) -> None:
        self._layout, self._pool, self._tables, self._take = layout, pool, tables, take

    def begin(self, sequence: Sequence) -> None:
        """It has a table row, and nothing else."""
        sequence.groups = [GroupPages() for _ in self._layout.groups]

    def pages_at_once(self, request: Request, tokens: int) -> int:
        """Pages that a sequence of so many tokens, its prompt among them, has at most at once."""
        return sum(self._most(request, index, tokens) for index in range(len(self._layout.groups)))

    def _most(self, request: Request, index: int, tokens: int) -> int:
        stages, stage = request.stages, self._layout.groups[index].stage
        assert stages is not None
        slots = stages.after(stage, tokens)
        if not request.units:
            return self._layout.pages_for(slots)
        unit = request.units[index]
        own = self._layout.pages_for(min(slots, unit.slots))
        if not request.most_prompt_pages:
            groups = range(len(self._layout.groups))
            request.most_prompt_pages = [self._most_of_prompt(request, each) for each in groups]
        return max(slots // unit.slots * unit.pages + own, request.most_prompt_pages[index])

    def _most_of_prompt(self, request: Request, index: int) -> int:
        """The same while the prompt is read, whose parts are coded when their step ends."""
        stages, stage, most = request.stages, self._layout.groups[index].stage, 0
        assert stages is not None
        unit = request.units[index]
        for begin, end in stages.parts:
            coded, own = divmod(stages.after(stage, begin), unit.slots)
            own += stages.after(stage, end) - stages.after(stage, begin)
            units = coded + own // unit.slots
            most = max(most, units * unit.pages + self._layout.pages_for(own))
        return most

    def reserve(self, sequence: Sequence, count: int, plan: StepPlan, available: int) -> int:
        """As ``CacheAccounting.reserve``; of a part of a prompt, all slots or none."""
        in_prompt = sequence.num_fed < len(sequence.request.prompt_token_ids)
        if not in_prompt and self._has_room(sequence, count):
            return count

        def growths(count: int) -> list[_Growth]:
            groups = range(len(self._layout.groups))
            return [self._growth(sequence, index, count) for index in groups]

        def needed(found: list[_Growth]) -> int:
            return sum(growth.pages for growth in found)

        found = growths(count)
        if needed(found) > available:
            if in_prompt:
                return 0
            count = bisect_right(
                range(1, count + 1), available, key=lambda fewer: needed(growths(fewer))
            )
            found = growths(count)
        if count:
            for index, growth in enumerate(found):
                self._grow(sequence, index, growth, plan)
        return count

    def _has_room(self, sequence: Sequence, count: int) -> bool:
        """Whether so many generated tokens take no pages: nothing is added, filled or copied."""
        size, references = self._layout.block_size, self._pool.references
        for held in sequence.groups:
            slots = held.slots + count
            # Where there is room, the last page is partly filled: what is shared is copied.
            if slots > len(held.tail) * size or references[held.tail[-1]] > 1:
                return False
        units = zip(sequence.groups, sequence.request.units, strict=False)
        return all(held.slots + count < unit.slots for held, unit in units)

    def _growth(self, sequence: Sequence, index: int, count: int) -> _Growth:
        stages, group = sequence.request.stages, self._layout.groups[index]
        assert stages is not None
        held, fed = sequence.groups[index], sequence.num_fed
        more = stages.after(group.stage, fed + count) - stages.after(group.stage, fed)
        units, unit_pages = 0, 0
        if sequence.request.units:
            unit = sequence.request.units[index]
            units, unit_pages = (held.slots + more) // unit.slots, unit.pages
        partly = held.slots % self._layout.block_size != 0
        shared = partly and self._pool.references[held.tail[-1]] > 1
        tail = self._layout.pages_for(held.slots + more) - len(held.tail)
        return _Growth(more, tail, units, unit_pages, shared)

    def _grow(self, sequence: Sequence, index: int, growth: _Growth, plan: StepPlan) -> None:
        held = sequence.groups[index]
        table = self._tables[index, sequence.table_row]
        if growth.copies:
            [page] = self._take(1)
            plan.copies.append((held.tail[-1], page))
            self._pool.release(held.tail[-1])
            held.tail[-1] = table[len(held.tail) - 1] = page
        if growth.tail:
            held.tail += self._take(growth.tail)
            table[len(held.tail) - growth.tail : len(held.tail)] = held.tail[-growth.tail :]
            if (held.slots + growth.slots) % self._layout.block_size != 0:
                plan.blank.append(held.tail[-1])
        held.fills = [self._take(growth.unit_pages) for _ in range(growth.units)]

    def advance(self, sequence: Sequence) -> None:
        """Its inputs have been fed: units that they filled take the place of slots."""
        request = sequence.request
        assert request.stages is not None
        for index, (group, held) in enumerate(
            zip(self._layout.groups, sequence.groups, strict=True)
        ):
            held.slots = request.stages.after(group.stage, sequence.num_fed)
            if not request.units:
                continue
            size = request.units[index].slots
            held.slots -= len(held.units) * size
            if held.fills:
                coded = len(held.fills) * size
                held.slots -= coded
                columns = coded // self._layout.block_size
                for page in held.tail[:columns]:
                    self._pool.release(page)
                del held.tail[:columns]
                self._tables[index, sequence.table_row, : len(held.tail)] = held.tail
                held.units += held.fills
                held.fills = []

    def adopt(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child``, which has the same table, share every page of ``parent``."""
        child.groups = [
            GroupPages(held.slots, list(held.tail), list(held.units)) for held in parent.groups
        ]
        for held in child.groups:
            for page in held.pages:
                self._pool.retain(page)

    def release(self, sequence: Sequence) -> None:
        """Take back everything."""
        for held in sequence.groups:
            for page in held.pages:
                self._pool.release(page)

    def check(self, sequence: Sequence) -> None:
        """Its slots, pages and table row agree. Raises AssertionError."""
        name, request = f"sequence {sequence.number}", sequence.request
        assert request.stages is not None
        for index, (group, held) in enumerate(
            zip(self._layout.groups, sequence.groups, strict=True)
        ):
            slots = request.stages.after(group.stage, sequence.num_fed)
            if request.units:
                coded, slots = divmod(slots, request.units[index].slots)
                if len(held.units) != coded:
                    raise AssertionError(f"{name} has {len(held.units)} units, and not {coded}")
            if held.slots != slots or len(held.tail) != self._layout.pages_for(slots):
                raise AssertionError(f"{name}: {held} are not pages of {slots} slots")
            if self._tables[index, sequence.table_row, : len(held.tail)].tolist() != held.tail:
                raise AssertionError(f"{name}: its table row is wrong")
