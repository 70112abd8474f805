"""A KV arena of which some layers' pages are on disk, and in memory while those layers run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.contracts.cache import CacheGroup, CacheLayout
from headrace.contracts.placement import Tier
from headrace.contracts.step import PageTables, PlanRow
from headrace.disk import DiskFile, Rotation, align, aligned_memory
from headrace.kv.arena import KVArena, carve, layer_caches
from headrace.ops.paged import LayerCache, PagedPlane

Pages = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StagedPages:
    """The pages of a block of rows in one cache group.

    Args:
        pages: ascending; the i-th lies at place i of a buffer.
        filled: places of those that hold something.
        changed: places of those that the step writes to.
    """

    pages: Pages
    filled: Pages
    changed: Pages


def stage(rows: Sequence[PlanRow], table: npt.NDArray[np.int32], block_size: int) -> StagedPages:
    """The pages that rows read and write, by their page table ``[rows, pages]``.

    A page is new to a row if the row has no slot in it before the step; it is then no other row's.
    """
    held, new, changed = [], [], []
    for row in rows:
        end = -(-(row.slot + len(row.input_ids)) // block_size)
        pages = table[row.table_row, :end].astype(np.int64)
        held.append(pages)
        new.append(pages[-(-row.slot // block_size) :])
        changed.append(pages[row.slot // block_size :])
    every = np.unique(np.concatenate(held))
    filled = np.flatnonzero(~np.isin(every, np.concatenate(new)))
    return StagedPages(every, filled, np.searchsorted(every, np.unique(np.concatenate(changed))))


def runs(staged: StagedPages, places: Pages) -> Iterator[tuple[int, int, int]]:
    """(first place, first page, count) of those that follow each other in buffer and file."""
    if len(places) == 0:
        return
    pages = staged.pages[places]
    breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(places) != 1)) + 1
    for part in np.split(np.arange(len(places)), breaks):
        yield int(places[part[0]]), int(pages[part[0]]), len(part)


class TieredArena(KVArena, Tier):
    """An arena on the CPU that holds more pages than memory: of ``spilled`` layers, on disk.

    The pages of a layer and a block of rows are read into a buffer before the layer runs over the
    block, and those that it changed are written back after. Attention finds them by tables of
    their own. In the file, a page has a record for every spilled layer of its group, and the
    records of a layer follow each other.

    Invariant: when a step has ended, every page in the file is as it left it.

    Attributes:
        spilled: layers whose pages are on disk.

    Args:
        block_pages: pages of a group that a block has at most.
        slots: buffers.
        file: has room for ``file_bytes``.
        ahead: whether pages are read while other layers and blocks compute.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        num_rows: int,
        *,
        spilled: Collection[int],
        block_pages: int,
        slots: int,
        file: DiskFile,
        ahead: bool,
    ) -> None:
        kept = layout.without(spilled)
        below = layout.without([layer for group in kept.groups for layer in group.layers])
        super().__init__(kept, num_pages, "cpu", num_rows)
        self.layout, self.spilled = layout, frozenset(spilled)
        self._file, self._num_pages = file, num_pages
        self._record = record_bytes(layout, spilled)
        self._buffers = [aligned_memory(block_pages * self._record) for _ in range(slots)]
        memories = [_pages(buffer, self._record) for buffer in self._buffers]
        self._staged: list[dict[int, LayerCache]] = [{} for _ in range(slots)]
        self._views: list[View] = []
        self._home: dict[int, tuple[int, int]] = {}
        for index, (above, under) in enumerate(zip(kept.groups, below.groups, strict=True)):
            if above.layers:
                self._add_view(index, above.layers, self.plane(above.layers[0], "key"), False)
            for region, layer in enumerate(under.layers):
                self._home[layer] = index, region
                for caches, memory in zip(self._staged, memories, strict=True):
                    alone = CacheGroup((layer,), (under.planes[region],))
                    caches |= layer_caches(carve(memory, alone, layout.block_size))
            if under.layers:
                plane = self._staged[0][under.layers[0]].keys
                self._add_view(index, under.layers, plane, True)
        self._blocks: dict[int, list[StagedPages]] = {}
        self._held: list[tuple[int, int] | None] = [None] * slots
        self._slot = 0
        self._rotation: Rotation[tuple[int, int] | None] = Rotation(
            slots, self._fill, ahead, "headrace-kv"
        )

    def _add_view(self, group: int, layers: Sequence[int], plane: PagedPlane, staged: bool) -> None:
        self._group_of |= dict.fromkeys(layers, len(self._views))
        self._views.append(View(group, plane, staged))

    @property
    def num_tables(self) -> int:
        """One for the layers of a group in memory, and one for those on disk."""
        return len(self._views)

    def group_plane(self, group: int) -> PagedPlane:
        """See ``KVArena``."""
        return self._views[group].plane

    def cache(self, layer: int) -> LayerCache:
        """See ``KVArena``; of a layer on disk, in the buffer that it has now."""
        if layer not in self._home:
            return super().cache(layer)
        return self._staged[self._slot][layer]

    def tables_of(self, block: int, rows: Sequence[PlanRow], tables: PageTables) -> PageTables:
        """See ``KVArena``: places in a buffer for what is on disk."""
        size = self.layout.block_size
        self._blocks[block] = [stage(rows, table, size) for table in tables]
        used = [row.table_row for row in rows]
        ends = [self.layout.pages_for(row.slot + len(row.input_ids)) for row in rows]
        seen = np.zeros((len(self._views), tables.shape[1], max(ends)), dtype=np.int32)
        for found, view in zip(seen, self._views, strict=True):
            found[used] = tables[view.group, used, : max(ends)]
            if view.staged:
                pages = self._blocks[block][view.group].pages
                # What stands behind a row's end means nothing, and stays within the buffer.
                places = np.searchsorted(pages, found[used])
                found[used] = np.minimum(places, len(pages) - 1)
        return seen

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """See ``KVArena``: in memory and in the file."""
        if not copies:
            return
        super().copy_pages(copies)
        record = aligned_memory(self._record)
        for region in {region for _, region in self._home.values()}:
            for source, target in copies:
                self._file.read(record, self._offset(region, source))
                self._file.write(record, self._offset(region, target))

    def _offset(self, region: int, page: int) -> int:
        return (region * self._num_pages + page) * self._record

    def _move(self, move: Move, item: tuple[int, int], slot: int, changed: bool) -> None:
        """Read or write pages of a layer and block."""
        layer, block = item
        group, region = self._home[layer]
        staged, size = self._blocks[block][group], self._record
        for place, page, count in runs(staged, staged.changed if changed else staged.filled):
            memory = self._buffers[slot][place * size : (place + count) * size]
            move(memory, self._offset(region, page))

    def _fill(self, slot: int, item: tuple[int, int] | None) -> None:
        """Write back what a buffer holds, and read what is next, if anything is."""
        held, self._held[slot] = self._held[slot], None
        if held is not None:
            self._move(self._file.write, held, slot, True)
        if item is None:
            return
        layer, block = item
        staged = self._blocks[block][self._home[layer][0]]
        # What new pages hold beyond what is written must be no other's, NaN least of all.
        empty = np.ones(len(staged.pages), dtype=bool)
        empty[staged.filled] = False
        memory = np.frombuffer(self._buffers[slot], dtype=np.uint8)
        memory[: len(empty) * self._record].reshape(len(empty), -1)[empty] = 0
        self._move(self._file.read, item, slot, False)
        self._held[slot] = item

    @property
    def waited(self) -> float:
        return self._rotation.waited

    def begin(self, blocks: int) -> None:
        order: list[tuple[int, int] | None] = [
            (layer, block) for layer in sorted(self._home) for block in range(blocks)
        ]
        # Behind them, what the last ones changed is written.
        self._rotation.start([*order, *[None] * len(self._buffers)])

    def enter(self, layer: int, block: int) -> None:
        if layer in self._home:
            self._slot = self._rotation.take()

    def leave(self, layer: int, block: int) -> None:
        if layer in self._home:
            self._rotation.give()

    def end(self) -> None:
        for _ in self._buffers:
            self._rotation.take()
            self._rotation.give()
        self._blocks = {}

    def stop(self) -> None:
        self._rotation.stop()
        self._held = [None] * len(self._buffers)
        self._blocks = {}

    def close(self) -> None:
        self._rotation.close()
        self._file.close()


@dataclass(frozen=True, slots=True)
class View:
    """Layers of a group that attention plans for together: those in memory, or those on disk.

    Args:
        plane: of keys of any of them.
    """

    group: int
    plane: PagedPlane
    staged: bool


Move = Callable[[memoryview, int], None]


def record_bytes(layout: CacheLayout, spilled: Collection[int]) -> int:
    """Bytes of a page of one layer in the file: those of the largest, aligned."""
    return align(max(layout.layer_bytes(layer) for layer in spilled))


def file_bytes(layout: CacheLayout, num_pages: int, spilled: Collection[int]) -> int:
    """Bytes of the file for the pages of these layers."""
    regions = max(len(set(group.layers) & set(spilled)) for group in layout.groups)
    return regions * num_pages * record_bytes(layout, spilled)


def _pages(buffer: memoryview, record: int) -> Tensor:
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    count = len(memory) // record
    return memory[: count * record].view(count, record)
