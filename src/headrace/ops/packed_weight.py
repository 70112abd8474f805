"""Weight formats, and the one packed layout of each: docs/weights.md draws it.

Everything here is bookkeeping: no value is rounded, and ``unpack`` undoes ``pack`` to the bit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headrace.errors import ConfigurationError

LAYOUT_VERSION = 1
"""Of the layout below; files state it."""

PANEL = 16
"""Rows of a weight that are stored together."""

_GROUPS = (32, 64, 128)
_DEFAULT_GROUP = 32

ACTIVATION_GROUP = 256
"""A multiple of every group of weights: one scale more for each of these would cost a tenth of the
speed."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the values of a linear weight are stored, and what they are multiplied with.

    A quantized value ``u`` (unsigned) stands for ``scale * (u - zero)``; activations are
    quantized to int8 for each token and, where the weight has groups, for every
    ``ACTIVATION_GROUP`` columns.

    Args:
        bits: of a value: 16 (bfloat16), 8 or 4.
        group: columns that share a scale; ``None``: all of a row.
        zero_points: whether each group has a zero of its own; else it is ``zero``.
    """

    bits: int
    group: int | None = None
    zero_points: bool = False

    @property
    def name(self) -> str:
        """As users write it: "bf16", "w8a8", "w4a8-g64", "w4a8-g64-zp"."""
        if self.bits == 16:
            return "bf16"
        group = "" if self.group is None else f"-g{self.group}"
        return f"{self.kernel}{group}{'-zp' if self.zero_points else ''}"

    @property
    def kernel(self) -> str:
        """The name without group and zero points."""
        return {16: "bf16", 8: "w8a8", 4: "w4a8"}[self.bits]

    @property
    def zero(self) -> int:
        """The value that stands for 0 where no zero points are stored."""
        return 1 << (self.bits - 1)

    @property
    def activation_group(self) -> int | None:
        """Columns of activations that share a scale; ``None``: all of a row."""
        return None if self.group is None else ACTIVATION_GROUP

    @property
    def bits_per_weight(self) -> float:
        """Of a large weight: values, scales and zero points."""
        if self.group is None:
            return self.bits
        return self.bits + (24 if self.zero_points else 16) / self.group

    def padded_columns(self, columns: int) -> int:
        """``columns`` as they are stored."""
        if self.group is not None:
            return _round_up(columns, math.lcm(self.group, 64))
        return _round_up(columns, 32 if self.bits == 16 else 64)

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """The format of a name; "w4a8" is the one with the default group.

        Raises:
            ConfigurationError: the name is unknown; lists the known ones.
        """
        if name == "w4a8":
            return cls(4, _DEFAULT_GROUP)
        for known in FORMATS:
            if known.name == name:
                return known
        names = ", ".join(known.name for known in FORMATS)
        raise ConfigurationError(f"weight format {name!r} is unknown; known: {names}")


FORMATS = (
    WeightFormat(16),
    WeightFormat(8),
    *(WeightFormat(4, *options) for options in itertools.product(_GROUPS, (False, True))),
)
"""All of them."""

BF16 = FORMATS[0]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in plain order; G is the number of groups, the last of which may be cut off.

    Args:
        values: uint8 ``[N, K]``.
        scales: fp32 ``[N, G]``; of 4-bit formats rounded to bf16 already.
        zeros: uint8 ``[N, G]`` of formats with zero points.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantize(self, format: WeightFormat) -> Tensor:
        """fp32 ``[N, K]``."""
        columns = self.values.shape[1]
        size = format.group or columns
        scales = self.scales.repeat_interleave(size, 1)[:, :columns]
        if self.zeros is None:
            return (self.values.float() - format.zero) * scales
        zeros = self.zeros.repeat_interleave(size, 1)[:, :columns]
        return (self.values.float() - zeros) * scales


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as kernels read it: panels of 16 rows, padded with zeros.

    A gated weight stacks two halves, gate over up, each padded by itself; its panels alternate
    between them. P is the number of panels, K and G count padded columns and their groups.

    Args:
        rows, columns: of the weight, both halves, without the padding.
        values: bf16 ``[P, K / 2, 16, 2]``; uint8 ``[P, K / 4, 16, 4]`` of 8 bits, or
            ``[P, K / 8, 16, 4]`` of 4, where byte ``(n, j)`` of step ``i`` holds column
            ``8i + j`` in its low half and ``8i + 4 + j`` in its high one.
        scales: fp32 ``[P * 16]`` of 8 bits, bf16 ``[P, G, 16]`` of 4.
        zeros: uint8 ``[P, G, 16]`` of formats with zero points.
    """

    format: WeightFormat
    rows: int
    columns: int
    gated: bool
    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        named = {"values": self.values, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.parts().values())

    def to(self, device: str) -> PackedWeight:
        """The same on a device."""
        parts: dict[str, Any] = {name: x.to(device) for name, x in self.parts().items()}
        return replace(self, **parts)


def part_shapes(
    format: WeightFormat, rows: int, columns: int, gated: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Element type and shape of each tensor of a ``PackedWeight``, by the name of its field."""
    panels = num_panels(rows, gated)
    padded = format.padded_columns(columns)
    if format.bits == 16:
        return {"values": (torch.bfloat16, (panels, padded // 2, PANEL, 2))}
    values = {"values": (torch.uint8, (panels, padded * format.bits // 32, PANEL, 4))}
    if format.group is None:
        return {**values, "scales": (torch.float32, (panels * PANEL,))}
    groups = (panels, padded // format.group, PANEL)
    parts = {**values, "scales": (torch.bfloat16, groups)}
    return {**parts, "zeros": (torch.uint8, groups)} if format.zero_points else parts


def num_panels(rows: int, gated: bool) -> int:
    """Panels of a weight of so many rows."""
    return 2 * -(-(rows // 2) // PANEL) if gated else -(-rows // PANEL)


def stored_places(rows: Tensor, total: int, gated: bool) -> Tensor:
    """Where ``rows`` (int64) of a weight of ``total`` rows are stored, counted in stored rows."""
    if not gated:
        return rows
    half = total // 2
    is_up = (rows >= half).long()
    row = rows - half * is_up
    return row // PANEL * (2 * PANEL) + row % PANEL + PANEL * is_up


def store_rows(x: Tensor, gated: bool, columns: int | None = None) -> Tensor:
    """``[N, ...]`` in stored order, ``[P * 16, ...]``; the second dimension padded to ``columns``.

    This is also how a bias comes to its panels. Where nothing changes, it is ``x`` itself.
    """
    size = [num_panels(len(x), gated) * PANEL, *x.shape[1:]]
    if columns is not None:
        size[1] = columns
    if not gated and size == list(x.shape):
        return x
    stored = x.new_zeros(size)
    kept = stored if columns is None else stored[:, : x.shape[1]]
    kept[stored_places(torch.arange(len(x), device=x.device), len(x), gated)] = x
    return stored


def pack_dense(weight: Tensor, gated: bool = False) -> PackedWeight:
    """``[N, K]`` in bf16."""
    rows, columns = weight.shape
    padded = store_rows(weight.bfloat16(), gated, BF16.padded_columns(columns))
    return PackedWeight(BF16, rows, columns, gated, _interleave(padded, 2))


def unpack_dense(weight: PackedWeight, rows: Tensor | None = None) -> Tensor:
    """bf16 ``[N, K]``, or only the given ``rows`` (int64 ``[R]``)."""
    return _gather(weight.values, _places(weight, rows))[:, : weight.columns]


def pack(weight: QuantizedWeight, format: WeightFormat, gated: bool = False) -> PackedWeight:
    """A quantized weight in the layout of its format."""
    rows, columns = weight.values.shape
    padded = format.padded_columns(columns)
    values = store_rows(weight.values, gated, padded)
    if format.group is None:
        scales = store_rows(weight.scales[:, 0], gated)
        return PackedWeight(format, rows, columns, gated, _interleave(values, 4), scales)
    low, high = values.reshape(len(values), -1, 2, 4).unbind(2)
    nibbles = _interleave((low | (high << 4)).flatten(1), 4)
    groups = padded // format.group
    scales = _interleave(store_rows(weight.scales.bfloat16(), gated, groups), 1).squeeze(-1)
    zeros = weight.zeros
    if zeros is not None:
        zeros = _interleave(store_rows(zeros, gated, groups), 1).squeeze(-1)
    return PackedWeight(format, rows, columns, gated, nibbles, scales, zeros)


def unpack(weight: PackedWeight, rows: Tensor | None = None) -> QuantizedWeight:
    """The quantized weight in plain order, or only the given ``rows`` (int64 ``[R]``)."""
    places = _places(weight, rows)
    values = _gather(weight.values, places)
    assert weight.scales is not None
    if weight.format.group is None:
        return QuantizedWeight(values[:, : weight.columns], weight.scales[places, None])
    nibbles = values.view(len(values), -1, 1, 4)
    values = torch.cat((nibbles & 15, nibbles >> 4), 2).flatten(1)
    groups = -(-weight.columns // weight.format.group)
    scales = _gather(weight.scales.unsqueeze(-1), places)[:, :groups].float()
    zeros = weight.zeros
    if zeros is not None:
        zeros = _gather(zeros.unsqueeze(-1), places)[:, :groups]
    return QuantizedWeight(values[:, : weight.columns], scales, zeros)


def _places(weight: PackedWeight, rows: Tensor | None) -> Tensor:
    if rows is None:
        rows = torch.arange(weight.rows, device=weight.values.device)
    return stored_places(rows, weight.rows, weight.gated)


def _interleave(lines: Tensor, width: int) -> Tensor:
    """``[P * 16, K]`` -> ``[P, K / width, 16, width]``."""
    return lines.reshape(-1, PANEL, lines.shape[1] // width, width).transpose(1, 2).contiguous()


def _gather(panels: Tensor, places: Tensor) -> Tensor:
    """``[P, S, 16, width]`` -> the stored rows ``places``, ``[R, S * width]``."""
    return panels[places // PANEL, :, places % PANEL].flatten(1)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
