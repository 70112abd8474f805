"""Weights as other programs quantize them, in one native layout: docs/weights.md draws it.

Values keep the bits that they have in a file, and scales their levels: nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.packed_weight import PANEL, num_panels, stored_places

QUAD = 4
"""Columns that lie side by side."""
_VALUES_AT_ONCE = 1 << 18
"""Values in plain order that packing holds at a time."""
BYTE_OFFSET = 128
"""What is added to signed values, which are stored without a sign."""

FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of E2M1 (OCP Microscaling Formats, section 5.3.3), a table of values."""

PLANES: dict[int, tuple[int, int]] = {
    2: (2, 0),
    3: (2, 1),
    4: (4, 0),
    5: (4, 1),
    6: (4, 2),
    8: (8, 0),
}
"""Bits of a value -> bits of its two planes."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How values are stored, and what they stand for.

    A group's scale is ``factor * step``, or ``factor`` where there are no steps. A value ``q``
    stands for ``scale * (table[q] - zero)``, or ``scale * q + low``, a low being ``factor * step``
    as well.

    Args:
        bits: of a value: 2, 3, 4, 5, 6 or 8.
        group: columns that share a scale: 16 to 256.
        zero: the value that stands for 0, where groups have neither lows nor zeros of their own.
        super: groups that share a factor. If they have steps, 256 columns share it or a multiple.
        table: of 16 signed values, for values of 4 bits.
    """

    bits: int
    group: int
    zero: int = 0
    super: int = 1
    table: tuple[int, ...] | None = None

    def padded_columns(self, columns: int) -> int:
        """``columns`` as they are stored."""
        unit = max(32, self.group * self.super)
        return -(-columns // unit) * unit

    @property
    def name(self) -> str:
        """For people."""
        return f"blocks of {self.bits} bits in groups of {self.group}"


@dataclass(frozen=True, slots=True)
class BlockParts:
    """A weight in plain order; G counts groups, and S factors of a row.

    Args:
        values: uint8 ``[N, K]``.
        factors: float16 or bfloat16 ``[N, S]``.
        steps: int8 ``[N, G]``.
        low_factors: as ``factors``; low_steps: as ``steps``.
        zeros: uint8 ``[N, G]``.
    """

    values: Tensor
    factors: Tensor
    steps: Tensor | None = None
    low_factors: Tensor | None = None
    low_steps: Tensor | None = None
    zeros: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockParts:
        """With every tensor changed."""
        return BlockParts(*(None if x is None else change(x) for x in self.tensors()))  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All, in the order of the fields."""
        low = self.low_factors, self.low_steps
        return self.values, self.factors, self.steps, *low, self.zeros

    @staticmethod
    def join(parts: Sequence[BlockParts], layout: BlockLayout, with_zeros: bool) -> BlockParts:
        """The rows of all, one weight's after another's.

        Args:
            with_zeros: whether the result has zeros of its own; the layout's are taken for weights
                that have none.
        """
        if with_zeros:
            parts = [part if part.zeros is not None else part.with_zeros(layout) for part in parts]
        columns = zip(*(part.tensors() for part in parts), strict=True)
        return BlockParts(*(None if x[0] is None else torch.cat(x) for x in columns))  # type: ignore[arg-type]

    def bits_per_weight(self, layout: BlockLayout) -> float:
        """Bits that a weight of such parts takes in the layout."""
        others = sum(x.nbytes for x in self.tensors()[1:] if x is not None)
        return layout.bits + 8 * others / self.values.numel()

    def with_zeros(self, layout: BlockLayout) -> BlockParts:
        """With the layout's zero for every group."""
        rows, columns = self.values.shape
        shape = rows, -(-columns // layout.group)
        return replace(self, zeros=self.values.new_full(shape, layout.zero))

    def dequantize(self, layout: BlockLayout) -> Tensor:
        """fp32 ``[N, K]``."""
        columns = self.values.shape[1]

        def spread(x: Tensor) -> Tensor:
            return x.repeat_interleave(layout.group, 1)[:, :columns]

        def level(factors: Tensor, steps: Tensor | None) -> Tensor:
            wide = factors.float().repeat_interleave(layout.super, 1)
            return spread(wide if steps is None else wide[:, : steps.shape[1]] * steps.float())

        scales = level(self.factors, self.steps)
        if self.low_factors is not None:
            return self.values.float() * scales + level(self.low_factors, self.low_steps)
        if layout.table is not None:
            table = torch.tensor(layout.table, dtype=torch.float32, device=self.values.device)
            return table[self.values.long()] * scales
        zero: float | Tensor = layout.zero if self.zeros is None else spread(self.zeros.float())
        return (self.values.float() - zero) * scales


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A weight as kernels read it, in panels of 16 rows, padded with zeros.

    P is the number of panels, K, G and S count padded columns, their groups and their factors.

    Args:
        rows, columns, gated: see ``PackedWeight``.
        planes: uint8 ``[P, K * bits / 32, 16, 4]`` of the lower bits, and of those above them or
            ``None``. Of a plane of b bits, byte ``(n, j)`` of block ``i`` holds column
            ``4 * (8 / b * i + q) + j`` of row n in its bits from ``b * q`` on.
        factors, low_factors: ``[P, S, 16]``; steps, low_steps, zeros: ``[P, G, 16]``.
    """

    layout: BlockLayout
    rows: int
    columns: int
    gated: bool
    planes: tuple[Tensor, Tensor | None]
    factors: Tensor
    steps: Tensor | None = None
    low_factors: Tensor | None = None
    low_steps: Tensor | None = None
    zeros: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of them."""
        optional = (*self.planes, self.steps, self.low_factors, self.low_steps, self.zeros)
        return [self.factors, *(tensor for tensor in optional if tensor is not None)]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockWeight:
        """With every tensor changed."""

        def changed(tensor: Tensor | None) -> Any:
            return None if tensor is None else change(tensor)

        names = ("factors", "steps", "low_factors", "low_steps", "zeros")
        parts = {name: changed(getattr(self, name)) for name in names}
        return replace(self, planes=(changed(self.planes[0]), changed(self.planes[1])), **parts)

    def to(self, device: str) -> BlockWeight:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device))


Take = Callable[[Tensor], BlockParts]
"""Rows (int64 ``[R]``) of a weight -> these rows of its parts."""


def pack_blocks(parts: BlockParts, layout: BlockLayout, gated: bool = False) -> BlockWeight:
    """A weight in the native layout."""

    def take(rows: Tensor) -> BlockParts:
        return parts.map(lambda x: x[rows])

    rows, columns = parts.values.shape
    return pack_rows(take, rows, columns, layout, gated)


def pack_rows(
    take: Take, rows: int, columns: int, layout: BlockLayout, gated: bool = False
) -> BlockWeight:
    """A weight in the native layout, of which a few rows at a time are held in plain order.

    Every taking gives the same optional parts.
    """
    panels = num_panels(rows, gated)
    row_of = torch.full((panels * PANEL,), -1)
    every = torch.arange(rows)
    row_of[stored_places(every, rows, gated)] = every
    step = max(1, _VALUES_AT_ONCE // (layout.padded_columns(columns) * PANEL))
    packed: dict[str, Tensor] = {}
    for first in range(0, panels, step):
        chosen = row_of[first * PANEL : (first + step) * PANEL]
        lines = take(chosen.clamp(min=0)).map(partial(_keep, chosen >= 0))
        for name, chunk in _pack_lines(lines, layout).items():
            if name not in packed:
                packed[name] = chunk.new_empty(panels, *chunk.shape[1:])
            packed[name][first : first + len(chunk)] = chunk
    planes = packed.pop("lower"), packed.pop("upper", None)
    return BlockWeight(layout, rows, columns, gated, planes, **packed)


def _keep(known: Tensor, lines: Tensor) -> Tensor:
    """With zeros in the lines that no row is in."""
    if not bool(known.all()):
        lines[~known] = 0
    return lines


def _pack_lines(lines: BlockParts, layout: BlockLayout) -> dict[str, Tensor]:
    """Lines of whole panels in the native layout, by the names of ``BlockWeight``."""
    padded = layout.padded_columns(lines.values.shape[1])
    lower, upper = PLANES[layout.bits]
    values = F.pad(lines.values, (0, padded - lines.values.shape[1]))
    packed = {"lower": _pack_plane(values & ((1 << lower) - 1), lower)}
    if upper:
        packed["upper"] = _pack_plane(values >> lower, upper)
    groups = padded // layout.group
    factors = groups // layout.super
    for name, width, tensor in (
        ("factors", factors, lines.factors),
        ("steps", groups, lines.steps),
        ("low_factors", factors, lines.low_factors),
        ("low_steps", groups, lines.low_steps),
        ("zeros", groups, lines.zeros),
    ):
        if tensor is not None:
            packed[name] = _by_panel(F.pad(tensor, (0, width - tensor.shape[1])))
    return packed


def unpack_blocks(weight: BlockWeight, rows: Tensor | None = None) -> BlockParts:
    """The weight in plain order, or only the given ``rows`` (int64 ``[R]``)."""
    device = weight.factors.device
    if rows is None:
        rows = torch.arange(weight.rows, device=device)
    places = stored_places(rows, weight.rows, weight.gated)
    panel, lane = places // PANEL, places % PANEL
    layout = weight.layout
    lower, upper = PLANES[layout.bits]
    values = _unpack_plane(weight.planes[0][panel, :, lane], lower)
    if weight.planes[1] is not None:
        values = values | (_unpack_plane(weight.planes[1][panel, :, lane], upper) << lower)
    groups = -(-weight.columns // layout.group)
    supers = -(-groups // layout.super)

    def plain(x: Tensor | None, width: int) -> Any:
        return None if x is None else x[panel, :, lane][:, :width]

    return BlockParts(
        values[:, : weight.columns],
        plain(weight.factors, supers),
        plain(weight.steps, groups),
        plain(weight.low_factors, supers),
        plain(weight.low_steps, groups),
        plain(weight.zeros, groups),
    )


def table_bytes(layout: BlockLayout) -> Tensor | None:
    """The table as kernels have it, uint8 ``[16]``."""
    if layout.table is None:
        return None
    return (torch.tensor(layout.table) + BYTE_OFFSET).to(torch.uint8)


def kernel_zero(layout: BlockLayout) -> int:
    """The value that stands for 0 in the bytes that kernels multiply."""
    return layout.zero if layout.table is None else BYTE_OFFSET


def _by_panel(lines: Tensor) -> Tensor:
    """``[P * 16, C]`` -> ``[P, C, 16]``."""
    return lines.view(-1, PANEL, lines.shape[1]).transpose(1, 2).contiguous()


def _pack_plane(values: Tensor, bits: int) -> Tensor:
    """``[P * 16, K]`` of so many bits -> ``[P, K * bits / 32, 16, 4]``."""
    each = 8 // bits
    quads = values.view(-1, PANEL, values.shape[1] // (QUAD * each), each, QUAD)
    packed = torch.zeros_like(quads[:, :, :, 0])
    for place in range(each):
        packed |= quads[:, :, :, place] << (bits * place)
    return packed.transpose(1, 2).contiguous()


def _unpack_plane(blocks: Tensor, bits: int) -> Tensor:
    """``[R, B, 4]`` -> values ``[R, K]``."""
    each = 8 // bits
    parts = [(blocks >> (bits * place)) & ((1 << bits) - 1) for place in range(each)]
    return torch.stack(parts, 2).flatten(1)
