"""The KV arena: one allocation, carved into pages that any cache group can take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.contracts.cache import CacheLayout, PlaneSpec
from headrace.ops.device import DTYPES
from headrace.ops.paged import PagedPlane


class KVArena:
    """``num_pages`` pages of ``layout.page_bytes`` bytes, and the planes inside them.

    A page is a row of equal blocks, one per (layer, plane) of its group; a block holds
    ``block_size`` slots of ``[heads, width]``. The memory is not touched before it is written.

    Raises:
        ValueError: the planes of the layout differ in size or dtype.
    """

    def __init__(self, layout: CacheLayout, num_pages: int, device: str) -> None:
        specs = {
            (plane.slot_bytes, plane.dtype)
            for group in layout.groups
            for planes in group.planes
            for plane in planes
        }
        if len(specs) != 1:
            raise ValueError(f"planes of one arena must be equally large, got {sorted(specs)}")
        self.layout = layout
        self._blocks_per_page = sum(len(planes) for planes in layout.groups[0].planes)
        _, dtype = specs.pop()
        elements = layout.page_bytes // DTYPES[dtype].itemsize
        self.pages = torch.empty(num_pages, elements, dtype=DTYPES[dtype], device=device)
        self._planes = {
            (layer, spec.name): self._plane(spec, offset)
            for group in layout.groups
            for offset, (layer, spec) in enumerate(
                (layer, spec)
                for layer, planes in zip(group.layers, group.planes, strict=True)
                for spec in planes
            )
        }
        self._group_of = {
            layer: index for index, group in enumerate(layout.groups) for layer in group.layers
        }

    def _plane(self, spec: PlaneSpec, offset: int) -> PagedPlane:
        size = self.layout.block_size
        blocks = self.pages.view(len(self.pages) * self._blocks_per_page, -1)
        slots = blocks.view(len(blocks) * size, -1)
        return PagedPlane(
            blocks=blocks[offset:],
            slots=slots[offset * size :],
            stride=self._blocks_per_page,
            block_size=size,
            heads=spec.heads,
            width=spec.width,
        )

    @property
    def num_bytes(self) -> int:
        """Size of the arena."""
        return self.pages.numel() * self.pages.element_size()

    def plane(self, layer: int, name: str) -> PagedPlane:
        """The plane ``name`` of ``layer``."""
        return self._planes[layer, name]

    def group_of(self, layer: int) -> int:
        """The cache group whose table serves ``layer``."""
        return self._group_of[layer]

    def group_plane(self, group: int) -> PagedPlane:
        """Any plane of a group: all share page stride and block size."""
        first = self.layout.groups[group]
        return self.plane(first.layers[0], first.planes[0][0].name)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (source, target) each; no target is also a source."""
        if copies:
            pairs = torch.tensor(copies, device=self.pages.device)
            self.pages[pairs[:, 1]] = self.pages[pairs[:, 0]]

    def blank_pages(self, pages: Sequence[int]) -> None:
        """Zero pages, so that slots which are not written yet read as zeros."""
        for page in pages:
            self.pages[page].zero_()
