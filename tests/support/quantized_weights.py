"""Random quantized weights, packed value by value after the definitions of the stored formats."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"

Matrix = list[list[int]]
Tensors = dict[str, Tensor]


@dataclass
class Weight:
    """Random integers, and what they stand for: ``scale * (value - zero)``.

    ``groups`` has the group of each column.
    """

    rows: int
    columns: int
    group: int
    bits: int = 4
    symmetric: bool = False
    shuffled: bool = False
    lowest_zero: int = 0
    size: float = 1.0
    seed: int = 0
    values: Matrix = field(init=False)
    zeros: Matrix = field(init=False)
    scales: Tensor = field(init=False)
    groups: list[int] = field(init=False)

    def __post_init__(self) -> None:
        draw, end = random.Random(self.seed), 1 << self.bits
        count = math.ceil(self.columns / self.group)

        def zero() -> int:
            return end // 2 if self.symmetric else draw.randrange(self.lowest_zero, end)

        self.values = [[draw.randrange(end) for _ in range(self.columns)] for _ in range(self.rows)]
        self.zeros = [[zero() for _ in range(count)] for _ in range(self.rows)]
        scales = [[draw.uniform(0.5, 1.5) for _ in range(count)] for _ in range(self.rows)]
        self.scales = (torch.tensor(scales) * self.size).half()
        self.groups = [column // self.group for column in range(self.columns)]
        if self.shuffled:
            draw.shuffle(self.groups)

    def dense(self) -> Tensor:
        """fp32 ``[rows, columns]``: products of so few bits are exact."""
        scales = self.scales.tolist()
        weight = [
            [
                scales[row][group] * (value - self.zeros[row][group])
                for value, group in zip(self.values[row], self.groups, strict=True)
            ]
            for row in range(self.rows)
        ]
        return torch.tensor(weight)


def signed(word: int) -> int:
    """The int32 of these 32 bits."""
    word %= 1 << 32
    return word - (1 << 32) if word >= 1 << 31 else word


def word_of(values: Sequence[int], bits: int) -> int:
    """The first in the lowest bits; places that are left are zero."""
    return sum(value << (bits * place) for place, value in enumerate(values))


def words_of(line: Sequence[int], bits: int) -> list[int]:
    """A line of values, packed word by word."""
    count = 32 // bits
    return [word_of(line[at : at + count], bits) for at in range(0, len(line), count)]


def int32(words: Matrix) -> Tensor:
    return torch.tensor([[signed(word) for word in line] for line in words], dtype=torch.int32)


def turned(matrix: Matrix) -> Matrix:
    """Rows to columns."""
    return [list(line) for line in zip(*matrix, strict=True)]


def pack_awq(weight: Weight, module: str = MODULE) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(matrix: Matrix) -> Tensor:
        return int32(
            [
                [word_of([line[at + n] for n in order], 4) for at in range(0, len(line), 8)]
                for line in turned(matrix)
            ]
        )

    return {
        f"{module}.qweight": packed(weight.values),
        f"{module}.qzeros": packed(weight.zeros),
        f"{module}.scales": weight.scales.t().contiguous(),
    }


def pack_gptq(weight: Weight, less: int) -> Tensors:
    """Args: less: what zero points are stored less."""
    bits = weight.bits
    zeros = [[zero - less for zero in line] for line in turned(weight.zeros)]
    return {
        f"{MODULE}.qweight": int32(turned([words_of(line, bits) for line in weight.values])),
        f"{MODULE}.qzeros": int32([words_of(line, bits) for line in zeros]),
        f"{MODULE}.scales": weight.scales.t().contiguous(),
        f"{MODULE}.g_idx": torch.tensor(weight.groups, dtype=torch.int32),
    }


def pack_compressed(weight: Weight) -> Tensors:
    """In the layout "pack-quantized", whose integers are around 0: they are packed plus the middle,
    and so as unsigned ones.
    """
    bits = weight.bits
    tensors = {
        f"{WEIGHT}_packed": int32([words_of(line, bits) for line in weight.values]),
        f"{WEIGHT}_scale": weight.scales,
        f"{WEIGHT}_shape": torch.tensor([weight.rows, weight.columns]),
    }
    if not weight.symmetric:
        packed = turned([words_of(line, bits) for line in turned(weight.zeros)])
        tensors[f"{WEIGHT}_zero_point"] = int32(packed)
    if weight.shuffled:
        tensors[f"{WEIGHT}_g_idx"] = torch.tensor(weight.groups, dtype=torch.int32)
    return tensors


def int8(matrix: Matrix) -> Tensor:
    return torch.tensor([[v - 128 for v in line] for line in matrix], dtype=torch.int8)


def number(byte: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Of a small floating-point type with the usual bias; no infinities, no NaN."""
    sign = -1.0 if byte >> (exponent_bits + mantissa_bits) else 1.0
    exponent = byte >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


E4M3 = [byte for byte in range(256) if byte & 127 != 127]
E5M2 = [byte for byte in range(256) if byte & 124 != 124]
"""The bytes that are numbers."""


def float8(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, list[list[float]]]:
    """Random numbers of type E4M3, stored and as they are."""
    draw = random.Random(seed)
    stored = [[draw.choice(E4M3) for _ in range(columns)] for _ in range(rows)]
    tensor = torch.tensor(stored, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return tensor, [[number(byte, 4, 3) for byte in line] for line in stored]


def scaled(values: list[list[float]], scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Every value times the scale of its block, rounded once, to fp32."""
    grid = scales.double().tolist()
    return torch.tensor(
        [
            [value * grid[row // block[0]][at // block[1]] for at, value in enumerate(line)]
            for row, line in enumerate(values)
        ]
    )


def pack_mxfp4(
    experts: int, rows: int, groups: int, exponents: range = range(100, 150)
) -> tuple[Tensors, Tensor]:
    """Random experts, stored, and fp32 ``[experts, rows, columns]``."""
    draw = random.Random(0)

    def tensor(*shape: int, values: range) -> Tensor:
        numbers = [draw.choice(values) for _ in range(math.prod(shape))]
        return torch.tensor(numbers, dtype=torch.uint8).view(shape)

    blocks = tensor(experts, rows, groups, 16, values=range(256))
    scales = tensor(experts, rows, groups, values=exponents)
    dense = torch.empty(experts, rows, groups * 32)
    for expert in range(experts):
        for row in range(rows):
            for group in range(groups):
                scale = 2.0 ** (int(scales[expert, row, group]) - 127)
                for place, byte in enumerate(blocks[expert, row, group].tolist()):
                    at = 32 * group + 2 * place
                    dense[expert, row, at] = number(byte & 15, 2, 1) * scale
                    dense[expert, row, at + 1] = number(byte >> 4, 2, 1) * scale
    return {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}, dense
