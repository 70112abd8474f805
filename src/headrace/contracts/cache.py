"""The shape of the KV cache: planes, groups and the layout of a page. No torch, no storage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Scope = Literal["slot", "page", "run", "sequence"]

ITEM_BYTES = {
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}

ALIGNMENT = 64
"""Bytes: a page, and in it the part of every plane, begins at a multiple of this."""

MOST_GROUPS = 8
"""Of one layout: each has page tables of its own, which a step has to keep."""


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
class LayerState:
    """What one layer keeps of a sequence.

    Args:
        planes: of scope "slot" with an entry for each token, or of scope "sequence" with one.
        window: slots, counted back from a query's own, that may still be read; ``None``: all.
    """

    planes: tuple[PlaneSpec, ...]
    window: int | None = None

    def of_scope(self, scope: Scope) -> tuple[PlaneSpec, ...]:
        """Its planes of one scope."""
        return tuple(plane for plane in self.planes if plane.scope == scope)


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one page table. ``planes[i]`` are the planes of ``layers[i]``.

    Pages behind the ``window`` of its layers are freed. In layers of another ``stage``, a sequence
    may have other slots.
    """

    layers: tuple[int, ...]
    planes: tuple[tuple[PlaneSpec, ...], ...]
    window: int | None = None
    stage: int = 0

    def page_bytes(self, block_size: int) -> int:
        """Bytes that its planes take in a page."""
        return sum(plane.page_bytes(block_size) for planes in self.planes for plane in planes)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How the byte arena is carved: a page freed by one group can serve any other.

    Args:
        block_size: slots of a page.
        groups: of layers with planes of scope "slot"; all have pages of the same size, that of
            the largest.
        states: (layer, plane) of scope "sequence": one entry for each sequence, outside the pages.
        method_states: the same, of methods. Only requests that have them use them, and what others
            share of their prefixes does not depend on them.
    """

    block_size: int
    groups: tuple[CacheGroup, ...]
    states: tuple[tuple[int, PlaneSpec], ...] = ()
    method_states: tuple[tuple[int, PlaneSpec], ...] = ()
    page_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = [group.page_bytes(self.block_size) for group in self.groups]
        object.__setattr__(self, "page_bytes", max(sizes, default=0))

    @property
    def token_bytes(self) -> float:
        """Bytes that one token takes in all groups together, what aligns planes included."""
        return self.page_bytes * len(self.groups) / self.block_size

    @property
    def all_states(self) -> tuple[tuple[int, PlaneSpec], ...]:
        """Those of the model and of methods."""
        return self.states + self.method_states

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's states."""
        return sum(plane.slot_bytes for _, plane in self.all_states)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of a page that are a layer's; 0 for one that has none."""
        return sum(
            plane.page_bytes(self.block_size)
            for group in self.groups
            for each, planes in zip(group.layers, group.planes, strict=True)
            if each == layer
            for plane in planes
        )

    def without(self, layers: Collection[int]) -> CacheLayout:
        """The same groups, some empty perhaps, without the pages' planes of these layers."""
        groups = []
        for group in self.groups:
            kept = [index for index, layer in enumerate(group.layers) if layer not in layers]
            planes = tuple(group.planes[index] for index in kept)
            left = tuple(group.layers[index] for index in kept)
            groups.append(CacheGroup(left, planes, group.window, group.stage))
        return CacheLayout(self.block_size, tuple(groups), self.states)

    @property
    def num_stages(self) -> int:
        """Stages of layers, in which a sequence may have different slots."""
        return 1 + max((group.stage for group in self.groups), default=0)

    @property
    def window(self) -> int | None:
        """The widest window of any group that has one."""
        return max((g.window for g in self.groups if g.window is not None), default=None)

    def pages_for(self, slots: int) -> int:
        """Pages of one group that hold ``slots`` slots."""
        return -(-slots // self.block_size)

    def columns_in_window(self, chunk: int) -> int | None:
        """Pages of a group with a window that a sequence needs at once, at most.

        ``chunk`` inputs of one step are written before pages are freed. ``None``: no group has one.
        """
        if self.window is None:
            return None
        return self.pages_for(self.window + chunk) + 1

    def pages_to_hold(self, slots: int, chunk: int) -> int:
        """Pages of all groups that a sequence of ``slots`` slots needs at most."""
        columns, most = self.pages_for(slots), self.columns_in_window(chunk)
        windowed = columns if most is None else min(columns, most)
        return sum(columns if group.window is None else windowed for group in self.groups)


def attention_state(
    kv_heads: int, head_dim: int, dtype: str, window: int | None = None
) -> LayerState:
    """Plain keys and values.

    With ``dtype`` "int8", both have a scale for each token and head, in planes of their own.
    """
    names = ("key", "value")
    planes = [PlaneSpec(name, "slot", kv_heads, head_dim, dtype) for name in names]
    if dtype == "int8":
        planes += [PlaneSpec(f"{name}_scale", "slot", kv_heads, 1, "float32") for name in names]
    return LayerState(tuple(planes), window)


def layout_of(
    states: Sequence[LayerState], block_size: int, stages: Sequence[int] = ()
) -> CacheLayout:
    """The layout for layers that keep these states.

    Layers of a stage with the same window share groups. Those that together need larger pages
    than others are split over several groups, so that pages of one size are well filled.

    Args:
        stages: layers with which another stage begins, ascending.
    """
    kinds: dict[tuple[int | None, int], list[int]] = {}
    for layer, state in enumerate(states):
        if state.of_scope("slot"):
            kinds.setdefault((state.window, bisect_right(stages, layer)), []).append(layer)

    def group(window: int | None, stage: int, layers: Iterable[int]) -> CacheGroup:
        chosen = tuple(layers)
        planes = tuple(states[i].of_scope("slot") for i in chosen)
        return CacheGroup(chosen, planes, window, stage)

    parts = _parts([len(layers) for layers in kinds.values()])
    groups = []
    for (kind, layers), count in zip(kinds.items(), parts, strict=True):
        groups += [group(*kind, layers[part::count]) for part in range(count)]
    entries = tuple((i, p) for i, state in enumerate(states) for p in state.of_scope("sequence"))
    return CacheLayout(block_size, tuple(groups), entries)


def _parts(sizes: Sequence[int]) -> list[int]:
    """Into how many groups so many layers each are split: so that, all pages being as large as the
    largest, they take the least; of splits that take the same, the one with the fewest groups.
    """
    splits = [[-(-size // most) for size in sizes] for most in range(1, max(sizes, default=0) + 1)]
    few = [parts for parts in splits if sum(parts) <= MOST_GROUPS] or splits[-1:]

    def cost(parts: Sequence[int]) -> tuple[int, int]:
        largest = max(-(-size // count) for size, count in zip(sizes, parts, strict=True))
        return largest * sum(parts), sum(parts)

    return min(few, key=cost, default=[])


def attention_layout(
    *, layers: int, kv_heads: int, head_dim: int, dtype: str, block_size: int
) -> CacheLayout:
    """One group for a model whose layers all hold plain keys and values."""
    return layout_of([attention_state(kv_heads, head_dim, dtype)] * layers, block_size)
