"""The shape of the KV cache: planes, groups and the layout of a page. No torch, no storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["slot", "page", "run", "sequence"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

ALIGNMENT = 64
"""Bytes: a page, and in it the part of every plane, begins at a multiple of this."""


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """One tensor of a layer's state.

    Args:
        name: "key", "value", or what a layer or policy declares.
        scope: what one entry belongs to; a slot holds one token.
        heads, width: shape of one entry, ``[heads, width]``.
        dtype: element type, by torch's name.
    """

    name: str
    scope: Scope
    heads: int
    width: int
    dtype: str

    @property
    def slot_bytes(self) -> int:
        """Bytes of one entry."""
        return self.heads * self.width * ITEM_BYTES[self.dtype]

    def page_bytes(self, block_size: int) -> int:
        """Bytes of the plane in one page, up to where the next plane may begin."""
        return -(-block_size * self.slot_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one page table. ``planes[i]`` are the planes of ``layers[i]``."""

    layers: tuple[int, ...]
    planes: tuple[tuple[PlaneSpec, ...], ...]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How the byte arena is carved: all groups have pages of the same size.

    Invariant: every group's page takes ``page_bytes``, so that a page freed by one group can
    serve any other.
    """

    block_size: int
    groups: tuple[CacheGroup, ...]

    def __post_init__(self) -> None:
        sizes = {self._group_bytes(group) for group in self.groups}
        if len(sizes) != 1:
            raise ValueError(f"groups of one layout need pages of one size, got {sorted(sizes)}")

    def _group_bytes(self, group: CacheGroup) -> int:
        return sum(plane.page_bytes(self.block_size) for planes in group.planes for plane in planes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of any group."""
        return self._group_bytes(self.groups[0])

    @property
    def token_bytes(self) -> float:
        """Bytes that one token takes in all groups together, what aligns planes included."""
        return self.page_bytes * len(self.groups) / self.block_size

    def pages_for(self, slots: int) -> int:
        """Pages of one group that hold ``slots`` slots."""
        return -(-slots // self.block_size)


def attention_layout(
    *, layers: int, kv_heads: int, head_dim: int, dtype: str, block_size: int
) -> CacheLayout:
    """One group for a model whose layers all hold plain keys and values.

    With ``dtype`` "int8", keys and values have a scale for each token and head, in planes of
    their own.
    """
    names = ("key", "value")
    planes = [PlaneSpec(name, "slot", kv_heads, head_dim, dtype) for name in names]
    if dtype == "int8":
        planes += [PlaneSpec(f"{name}_scale", "slot", kv_heads, 1, "float32") for name in names]
    group = CacheGroup(tuple(range(layers)), (tuple(planes),) * layers)
    return CacheLayout(block_size, (group,))
