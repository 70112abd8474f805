"""The KV arena: one allocation, carved into pages that any cache group can take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headrace.contracts.cache import CacheGroup, CacheLayout, PlaneSpec
from headrace.contracts.step import PageTables, PlanRow
from headrace.ops.device import DTYPES, empty_bytes
from headrace.ops.paged import LayerCache, PagedPlane

States = dict[str, Tensor]
"""Name of a plane -> ``[rows, heads, width]``, one entry for each row of the page tables."""

_DTYPES = {**DTYPES, "int8": torch.int8, "int32": torch.int32}


Planes = dict[tuple[int, str], PagedPlane]
"""(layer, name) -> plane."""


def carve(pages: Tensor, group: CacheGroup, block_size: int) -> Planes:
    """The planes of a group, one after another in ``pages``; a plane's scales come to it."""
    found: Planes = {}
    offset = 0
    for layer, planes in zip(group.layers, group.planes, strict=True):
        made = {}
        for spec in planes:
            made[spec.name] = _plane(pages, spec, offset, block_size)
            offset += spec.page_bytes(block_size)
        for name, plane in made.items():
            plane.scales = made.get(f"{name}_scale")
            found[layer, name] = plane
    return found


def _plane(pages: Tensor, spec: PlaneSpec, offset: int, block_size: int) -> PagedPlane:
    dtype = _DTYPES[spec.dtype]
    strip = block_size * spec.width * dtype.itemsize
    offsets = tuple(offset + head * strip for head in range(spec.heads))
    return PagedPlane(pages, offsets, block_size, spec.width, dtype)


def layer_caches(planes: Planes) -> dict[int, LayerCache]:
    """What attention reads and writes of each layer."""
    return {
        layer: LayerCache(key, planes.get((layer, "value"), key))
        for (layer, name), key in planes.items()
        if name == "key"
    }


class KVArena:
    """``num_pages`` pages of ``layout.page_bytes`` bytes, and the planes inside them.

    A page holds, one after another, the planes of the layers of its group; a plane holds, one
    after another, the strips of its heads, ``[block_size, width]`` each. The memory is not
    touched before it is written. Invariant: pages and planes begin at multiples of 64 bytes.

    Planes of scope "sequence" have an entry for each of ``num_rows`` table rows.
    """

    def __init__(self, layout: CacheLayout, num_pages: int, device: str, num_rows: int = 0) -> None:
        self.layout = layout
        memory = empty_bytes(num_pages * layout.page_bytes, device)
        self.pages = memory.view(num_pages, layout.page_bytes)
        self._planes: Planes = {}
        for group in layout.groups:
            self._planes |= carve(self.pages, group, layout.block_size)
        self._group_of = {
            layer: index for index, group in enumerate(layout.groups) for layer in group.layers
        }
        self._caches = layer_caches(self._planes)
        self._states: dict[int, States] = {}
        for layer, spec in layout.all_states:
            shape = (num_rows, spec.heads, spec.width)
            plane = torch.zeros(shape, dtype=_DTYPES[spec.dtype], device=device)
            self._states.setdefault(layer, {})[spec.name] = plane

    @property
    def num_bytes(self) -> int:
        """Size of the arena."""
        return self.pages.numel()

    def plane(self, layer: int, name: str) -> PagedPlane:
        """The plane ``name`` of ``layer``."""
        return self._planes[layer, name]

    def cache(self, layer: int) -> LayerCache:
        """What attention reads and writes of ``layer``."""
        return self._caches[layer]

    def group_of(self, layer: int) -> int:
        """The cache group whose table serves ``layer``."""
        return self._group_of[layer]

    def states(self, layer: int) -> States:
        """What ``layer`` keeps for whole sequences."""
        return self._states[layer]

    def groups_from(self, layer: int) -> set[int]:
        """The same for all layers from one on."""
        return {group for each, group in self._group_of.items() if each >= layer}

    @property
    def num_tables(self) -> int:
        """Page tables that ``group_of`` counts: a group's, unless it says otherwise."""
        return len(self.layout.groups)

    def tables_of(self, block: int, rows: Sequence[PlanRow], tables: PageTables) -> PageTables:
        """The page tables by which attention finds the pages of these rows.

        Args:
            block: number of the rows' block in the step.
            tables: of the engine, where no page has moved.
        """
        return tables

    def group_plane(self, group: int) -> PagedPlane:
        """Any plane of a group that holds keys: all share block size and heads."""
        return self.plane(self.layout.groups[group].layers[0], "key")

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (source, target) each; no target is also a source."""
        if copies:
            pairs = torch.tensor(copies, device=self.pages.device)
            self.pages[pairs[:, 1]] = self.pages[pairs[:, 0]]

    def move_slots(self, layer: int, source: Tensor, kept: Tensor, target: Tensor) -> None:
        """Copy slots of a layer to other pages, of every head others.

        Args:
            source, target: int64 ``[n]`` and ``[m]``: pages, of which none is in both.
            kept: int64 ``[heads, m * block_size]``: slots of ``source``, in their new order.
        """
        for (owner, _), plane in self._planes.items():
            if owner == layer:
                plane.move(source, kept, target)

    def blank_pages(self, pages: Sequence[int]) -> None:
        """Zero pages, so that slots which are not written yet read as zeros."""
        for page in pages:
            self.pages[page].zero_()

    def copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the states of table rows, (source, target) each, one after another."""
        for source, target in copies:
            for plane in self._all_states():
                plane[target] = plane[source]

    def clear_states(self, rows: Sequence[int]) -> None:
        """Begin anew in these table rows."""
        if not rows or not self._states:
            return
        places = torch.tensor(rows, dtype=torch.int64, device=self.pages.device)
        for plane in self._all_states():
            plane.index_fill_(0, places, 0)

    def _all_states(self) -> Iterator[Tensor]:
        return (plane for planes in self._states.values() for plane in planes.values())
