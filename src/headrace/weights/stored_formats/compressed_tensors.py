"""``quant_method`` "compressed-tensors": integers of 4 or 8 bits, and F8_E4M3.

The layouts are those of the library compressed-tensors. For a weight ``[out, in]``:

- "pack-quantized": integers of B bits in ``weight_packed``, int32 ``[out, in * B / 32]``, where a
  word has successive columns, the first in its lowest bits; ``weight_shape`` is ``[2]``;
  ``weight_zero_point``, if they are not symmetric, is int32 ``[out * B / 32, G]``, where a word has
  successive rows; ``weight_g_idx``, int32 ``[in]``, is the group of each column where columns were
  quantized in the order of their activations. Values and zero points are stored plus
  ``2 ** (B - 1)``.
- "int-quantized": ``weight`` and ``weight_zero_point`` are int8.
- "float-quantized": ``weight`` is F8_E4M3.

``weight_scale`` is ``[out, G]``, or one for each block, or one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.weights.stored_formats import StoredQuantized, StoredWeight
from headrace.weights.stored_formats.float8 import FLOAT8, Float8Weight
from headrace.weights.stored_formats.integers import (
    IntegerWeight,
    count_words,
    in_turn,
    matrix_shape,
    read_order,
    unpack,
)
from headrace.weights.stored_formats.scales import count_blocks, read_scales, single_shape
from headrace.weights.stored_formats.section import (
    choose,
    read_block,
    read_choice,
    read_group,
    read_object,
    unsupported,
)
from headrace.weights.stored_formats.targets import Target, read_targets
from headrace.weights.tensor_files import TensorFiles

_PACKED = "weight_packed"
_FOR_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""Tensors of a module that are not used: activations are quantized in another way here."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are stored.

    Args:
        block: rows and columns that share a scale; ``None``: all.
        ordered: whether columns are out of order.
    """

    layout: Layout
    bits: int
    symmetric: bool
    block: tuple[int | None, int | None]
    ordered: bool

    @classmethod
    def parse(cls, weights: Mapping[str, Any], format: object) -> Scheme:
        """From what a config group says of weights, and the format that is stated for it.

        Raises:
            CheckpointError: it is not read.
        """
        layout = _LAYOUTS[choose("format", format, tuple(_LAYOUTS))]
        strategy = read_choice(weights, "strategy", layout.strategies, _implied_strategy(weights))
        order = weights.get("actorder") or "weight"
        order = "group" if order is True else order
        order = choose("actorder", order, ("weight", "static", "group", "dynamic"))
        read_choice(weights, "type", (layout.type,), "int")
        return cls(
            layout,
            read_choice(weights, "num_bits", layout.bits, 8),
            read_choice(weights, "symmetric", layout.symmetric, True),
            _read_block(weights, strategy),
            order in ("group", "dynamic"),
        )

    @property
    def integers(self) -> tuple[int, int | None, bool]:
        """Bits, group and symmetry, as ``IntegerWeight`` takes them."""
        return self.bits, self.block[1], self.symmetric


def _implied_strategy(weights: Mapping[str, Any]) -> str:
    group = weights.get("group_size")
    if group is None:
        return "tensor"
    return "channel" if group == -1 else "group"


def _read_block(weights: Mapping[str, Any], strategy: str) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale; ``None``: all."""
    if strategy == "block":
        block = read_block(weights, "block_structure")
        if block is None:
            raise unsupported("block_structure", block, ("two positive integers",))
        return block
    if strategy == "group":
        return 1, read_group(weights)
    return (None, None) if strategy == "tensor" else (1, None)


class PackQuantizedWeight(IntegerWeight):
    """A weight of a module whose values are packed into words."""

    def __init__(self, files: TensorFiles, module: str, scheme: Scheme) -> None:
        name = f"{module}.weight"
        kinds = ("packed", "shape", "scale", "zero_point", "g_idx")
        others = [f"{module}.{kind}" for kind in _FOR_ACTIVATIONS]
        parts = [*(f"{name}_{kind}" for kind in kinds), *others]
        super().__init__(files, name, parts, f"{name}_scale", *scheme.integers)
        self._scheme = scheme

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        rows, columns = self._files.load(f"{self.name}_shape", (2,), ("I64", "I32")).tolist()
        return rows, columns

    def quantized(self) -> StoredQuantized:
        """See ``StoredWeight``."""
        files, name, bits = self._files, self.name, self._scheme.bits
        rows, columns = self.shape
        group = self._scheme.block[1] or columns
        groups = count_blocks(columns, group)
        words = files.load(f"{name}_packed", (rows, count_words(columns, bits)), ("I32",))
        return StoredQuantized(
            unpack(words, in_turn(bits), bits)[:, :columns].contiguous(),
            read_scales(files, f"{name}_scale", (rows, groups)),
            None if self._scheme.symmetric else self._zeros(rows, groups),
            bits,
            group,
            self.order(),
        )

    def order(self) -> Tensor | None:
        """See ``IntegerWeight``."""
        if not self._scheme.ordered:
            return None
        columns = self.shape[1]
        return read_order(self._files, f"{self.name}_g_idx", columns, self._group or columns)

    def _zeros(self, rows: int, groups: int) -> Tensor:
        bits = self._scheme.bits
        shape = count_words(rows, bits), groups
        words = self._files.load(f"{self.name}_zero_point", shape, ("I32",))
        return unpack(words.t(), in_turn(bits), bits)[:, :rows].t().contiguous()


class IntQuantizedWeight(IntegerWeight):
    """A weight of a module whose values are bytes."""

    def __init__(self, files: TensorFiles, module: str, scheme: Scheme) -> None:
        name = f"{module}.weight"
        others = [f"{module}.{kind}" for kind in _FOR_ACTIVATIONS]
        parts = [name, f"{name}_scale", f"{name}_zero_point", *others]
        super().__init__(files, name, parts, f"{name}_scale", *scheme.integers)
        self._scheme = scheme

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return matrix_shape(self._files[self.name])

    def quantized(self) -> StoredQuantized:
        """See ``StoredWeight``."""
        files, name, block = self._files, self.name, self._scheme.block
        rows, columns = self.shape
        group = block[1] or columns
        grid = count_blocks(rows, block[0] or rows), count_blocks(columns, group)
        zeros = None
        if not self._scheme.symmetric:
            shape = single_shape(files, f"{name}_zero_point") if grid == (1, 1) else grid
            stored = files.load(f"{name}_zero_point", shape, ("I8",)).view(grid)
            zeros = _from_signed(stored).expand(rows, -1).contiguous()
        return StoredQuantized(
            _from_signed(files.load(name, (rows, columns), ("I8",))),
            read_scales(files, f"{name}_scale", grid).expand(rows, -1).contiguous(),
            zeros,
            self._scheme.bits,
            group,
        )


def _from_signed(x: Tensor) -> Tensor:
    """int8 -> uint8, 128 more: that turns the highest bit."""
    return x.view(torch.uint8) ^ 128


def _make_float8(files: TensorFiles, module: str, scheme: Scheme) -> StoredWeight:
    name, others = f"{module}.weight", [f"{module}.{kind}" for kind in _FOR_ACTIVATIONS]
    return Float8Weight(files, name, f"{name}_scale", scheme.block, others)


@dataclass(frozen=True, slots=True)
class Layout:
    """A format: with what it is read, and what it makes of a module.

    Args:
        values, dtype: the tensor of a module that has its values, and the element type of that.
    """

    values: str
    dtype: str
    type: str
    bits: Sequence[int]
    symmetric: Sequence[bool]
    strategies: Sequence[str]
    make: Callable[[TensorFiles, str, Scheme], StoredWeight]


_LAYOUTS: Mapping[str, Layout] = {
    "pack-quantized": Layout(
        _PACKED,
        "I32",
        "int",
        (4, 8),
        (True, False),
        ("channel", "group"),
        PackQuantizedWeight,
    ),
    "int-quantized": Layout(
        "weight",
        "I8",
        "int",
        (8,),
        (True, False),
        ("tensor", "channel", "group"),
        IntQuantizedWeight,
    ),
    "float-quantized": Layout(
        "weight",
        FLOAT8,
        "float",
        (8,),
        (True,),
        ("tensor", "channel", "block"),
        _make_float8,
    ),
}


class Schemes:
    """The scheme of each module, by ``config_groups`` and ``ignore``.

    Raises:
        CheckpointError: a scheme is not read.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._ignored = read_targets(section, "ignore")
        self._schemes: list[tuple[Target, Scheme]] = []
        groups = read_object(section, "config_groups")
        for name in groups:
            group = read_object(groups, name)
            weights = read_object(group, "weights")
            if weights:
                scheme = Scheme.parse(weights, group.get("format") or section.get("format"))
                targets = read_targets(group, "targets")
                self._schemes += [(target, scheme) for target in targets]
        self._schemes.sort(key=lambda entry: entry[0].precedence)

    def ignores(self, module: str) -> bool:
        """Whether it is stored plainly, whatever group it would be in."""
        return any(target.means(module) for target in self._ignored)

    def find(self, module: str) -> Scheme:
        """The scheme of a module. Raises CheckpointError: it is in no group."""
        for target, scheme in self._schemes:
            if target.means(module):
                return scheme
        raise unsupported("config_groups", f"without a target for {module}")


def find_weights(section: Mapping[str, Any], files: TensorFiles) -> dict[str, StoredWeight]:
    """See ``WeightFinder``."""
    read_choice(read_object(section, "sparsity_config"), "format", ("dense",), "dense")
    if section.get("transform_config"):
        raise unsupported("transform_config", section["transform_config"])
    schemes = Schemes(section)
    signs = {(layout.values, layout.dtype) for layout in _LAYOUTS.values()}
    weights: dict[str, StoredWeight] = {}
    for name in files:
        module, _, kind = name.rpartition(".")
        sign = kind, files[name].dtype
        if (kind != _PACKED and sign not in signs) or schemes.ignores(module):
            continue
        scheme = schemes.find(module)
        if sign != (scheme.layout.values, scheme.layout.dtype):
            raise CheckpointError(
                f"{files[name].path}: tensor {name!r} is stored as {sign[1]}, but config.json asks "
                f"for {module}.{scheme.layout.values} as {scheme.layout.dtype}; they do not belong "
                "together"
            )
        weights[f"{module}.weight"] = scheme.layout.make(files, module, scheme)
    return weights
