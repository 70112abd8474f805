"""Views: the layers of a forward read some pages of a sequence in place of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.step import PageTables, PlanRow
from headrace.kv.arena import KVArena
from headrace.ops.paged import Indices, PagedPlane
from headrace.ops.recurrent import RowSpans


class PageView(ABC):
    """Which pages each layer reads and writes for the rows of a forward.

    Positions are data: keys are cached rotated at their own, so any pages can stand one after
    another. The last of them take what is fed; what they held there is overwritten.
    """

    @abstractmethod
    def tables(self, layer: int, rows: RowSpans, queries: Callable[[], Tensor]) -> PageTables:
        """``[R, pages]``: the pages of each row, wide enough for its context.

        Args:
            queries: of the rows' inputs in this layer, rotated, ``[T, heads, width]``.
        """


@dataclass(slots=True)
class _Choice:
    """Of the first ``full`` pages of ``sequence``, when it had ``slot`` slots, those that each
    layer reads.
    """

    sequence: int
    slot: int
    full: int
    columns: dict[int, Indices] = field(default_factory=dict)


class ChosenPages(PageView):
    """Some of the full pages of a sequence, chosen by each layer for itself, and all that came
    after the choice.

    Args:
        budget: slots of the pages that are chosen.
        refresh: tokens after which a sequence's pages are chosen again.
    """

    def __init__(self, arena: KVArena, budget: int, refresh: int) -> None:
        self._arena, self._refresh = arena, refresh
        self._most = arena.layout.pages_for(budget)
        self._choices: dict[int, _Choice] = {}
        self._ends: dict[int, int] = {}
        self._tables: PageTables

    @abstractmethod
    def choose(self, keys: PagedPlane, pages: Tensor, query: Tensor, count: int) -> Tensor:
        """Which ``count`` of the pages are read, int64 ``[count]``: places in ``pages``.

        Args:
            keys: of one layer.
            pages: int64 ``[n]``, full, in order.
            query: the latest one, rotated, ``[heads, width]``.
        """

    def begin(self, rows: Sequence[PlanRow], tables: PageTables) -> None:
        """The rows of a step, each with one input, and the engine's page tables."""
        self._tables = tables
        for row in rows:
            slots = row.slot + len(row.input_ids) + row.draft_room
            self._ends[row.table_row] = self._arena.layout.pages_for(slots)
            last = self._choices.get(row.table_row)
            fresh = last is not None and last.sequence == row.sequence
            if last is None or not fresh or row.slot - last.slot >= self._refresh:
                full = row.slot // self._arena.layout.block_size
                self._choices[row.table_row] = _Choice(row.sequence, row.slot, full)

    def slot(self, row: PlanRow) -> int:
        """Where the input of a row is in its view."""
        passed = max(0, self._choices[row.table_row].full - self._most)
        return row.slot - passed * self._arena.layout.block_size

    def tables(self, layer: int, rows: RowSpans, queries: Callable[[], Tensor]) -> PageTables:
        found = []
        first = 0
        for table_row, length in zip(rows.table_rows, rows.lengths, strict=True):
            choice = self._choices[table_row]
            pages = self._tables[self._arena.group_of(layer), table_row]
            if layer not in choice.columns:
                choice.columns[layer] = np.arange(choice.full)
                if choice.full > self._most:
                    old = torch.from_numpy(pages[: choice.full].astype(np.int64))
                    query, keys = queries()[first], self._arena.cache(layer).keys
                    best = self.choose(keys, old.to(query.device), query, self._most)
                    choice.columns[layer] = best.sort().values.cpu().numpy()
            recent = pages[choice.full : self._ends[table_row]]
            found.append(np.concatenate((pages[choice.columns[layer]], recent)))
            first += length
        padded = np.zeros((len(found), max(map(len, found))), dtype=np.int32)
        for line, chosen in zip(padded, found, strict=True):
            line[: len(chosen)] = chosen
        return padded
