"""The element types of GGUF: how many bytes a block takes, and what its elements are.

Sources are ggml's ``ggml-common.h`` (layouts of blocks) and ``ggml-quants.c`` (what they stand
for). Products and sums are in fp32 and in the order in which they are made there, so that results
are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.ops.block_weight import FP4, BlockLayout, BlockParts

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Steps = NDArray[np.int8]
Values = Bytes | Steps

_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 4 bits of IQ4_NL and IQ4_XS stand for."""


@dataclass(frozen=True, slots=True)
class Fields:
    """What blocks hold: G groups each, whose values share a scale. Names are ``BlockParts``'.

    Args:
        values: uint8 ``[n, size]``.
        factors: fp32 ``[n, 1]``; low_factors: as ``factors``.
        steps: int8 ``[n, G]``; ``None``: 1; low_steps: as ``steps``.
    """

    values: Bytes
    factors: Floats
    steps: Steps | None = None
    low_factors: Floats | None = None
    low_steps: Steps | None = None


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of elements.

    Args:
        number: by which files name it.
        size: elements of a block.
        num_bytes: of a block.
        dtype: that its elements have, if they are not quantized.
        layout: in which a weight has the same values, if they are.
        fields: what blocks ``[n, num_bytes]`` hold, if they are.
        factor_dtype: has all of its factors.
    """

    number: int
    name: str
    size: int
    num_bytes: int
    dtype: torch.dtype | None = None
    layout: BlockLayout | None = None
    fields: Callable[[Bytes], Fields] | None = None
    factor_dtype: torch.dtype = torch.float16

    def row_bytes(self, columns: int) -> int:
        """Of a row of ``columns`` elements, a multiple of ``size``."""
        return columns // self.size * self.num_bytes

    def dequantize(self, rows: Bytes) -> Floats:
        """Rows of whole blocks ``[n, bytes]`` -> fp32 ``[n, elements]``."""
        blocks = np.ascontiguousarray(rows).reshape(-1, self.num_bytes)
        with np.errstate(over="ignore", invalid="ignore"):
            values = self._values(blocks)
        return values.reshape(len(rows), rows.shape[1] // self.num_bytes * self.size)

    def _values(self, blocks: Bytes) -> Floats:
        if self.fields is None or self.layout is None:
            assert self.dtype is not None
            plain: Floats = torch.from_numpy(blocks).view(self.dtype).float().numpy()
            return plain
        fields = self.fields(blocks)
        if self.layout.table is None:
            values = fields.values.astype(np.float32) - np.float32(self.layout.zero)
        else:
            values = np.array(self.layout.table, np.float32)[fields.values]
        scales = _levels(fields.factors, fields.steps)
        scaled = scales[..., None] * values.reshape(*scales.shape, -1)
        if fields.low_factors is None:
            return scaled
        return scaled + _levels(fields.low_factors, fields.low_steps)[..., None]

    @property
    def bits_per_weight(self) -> float:
        """Of a quantized type in its layout."""
        assert self.layout is not None
        block = np.zeros((1, self.num_bytes), np.uint8)
        return self.parts(block).bits_per_weight(self.layout)

    def parts(self, rows: Bytes) -> BlockParts:
        """Rows of whole blocks ``[n, bytes]`` of a quantized type, in parts of its layout."""
        assert self.fields is not None
        fields = self.fields(np.ascontiguousarray(rows).reshape(-1, self.num_bytes))

        def by_row(x: Values | Floats | None, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).view(len(rows), -1)

        def steps(x: Steps | None) -> Tensor | None:
            return None if x is None else by_row(x, torch.int8)

        low = fields.low_factors
        return BlockParts(
            by_row(fields.values, torch.uint8),
            by_row(fields.factors, self.factor_dtype),
            steps(fields.steps),
            None if low is None else by_row(low, self.factor_dtype),
            steps(fields.low_steps),
        )


def _levels(factors: Floats, steps: Steps | None) -> Floats:
    """A level of each group, ``[n, G]``."""
    return factors if steps is None else factors * steps.astype(np.float32)


def _half(blocks: Bytes, first: int) -> Floats:
    """The fp16 at byte ``first`` of each block, ``[n, 1]``."""
    return blocks[:, first : first + 2].view("<f2").astype(np.float32)


def _fields(packed: Bytes, width: int, bits: int) -> Bytes:
    """Fields of ``bits`` out of bytes ``[n, k]``, as ``[n, k * 8 / bits]``.

    Of each ``width`` bytes, the lowest fields come first, then the next ones.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    fields = packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _q8_0(blocks: Bytes) -> Fields:
    """An fp16 scale and 32 int8."""
    return Fields(blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0))


def _q4_0(blocks: Bytes) -> Fields:
    """An fp16 scale; 4-bit values, the first 16 in the low halves of 16 bytes."""
    return Fields(_fields(blocks[:, 2:], 16, 4), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Fields:
    """An fp16 scale and an fp16 minimum; 4-bit values as in Q4_0."""
    values = _fields(blocks[:, 4:], 16, 4)
    return Fields(values, _half(blocks, 0), low_factors=_half(blocks, 2))


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bits of 4 bytes, the lowest of the first byte first, as 16s, ``[n, 32]``."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Bytes) -> Fields:
    """An fp16 scale; 4 bytes of fifth bits; 4-bit values as in Q4_0."""
    values = _fields(blocks[:, 6:], 16, 4) | _fifth_bits(blocks[:, 2:6])
    return Fields(values, _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Fields:
    """An fp16 scale and an fp16 minimum; 5-bit values as in Q5_0."""
    values = _fields(blocks[:, 8:], 16, 4) | _fifth_bits(blocks[:, 4:8])
    return Fields(values, _half(blocks, 0), low_factors=_half(blocks, 2))


def _q2_k(blocks: Bytes) -> Fields:
    """16 bytes, in each the scale (low) and minimum (high half) of 16 elements; 2-bit values of
    each 128 elements in 32 bytes; fp16 scales of the scales and of the minima, to be taken away.
    """
    return Fields(
        _fields(blocks[:, 16:80], 32, 2),
        _half(blocks, 80),
        (blocks[:, :16] & np.uint8(15)).view(np.int8),
        -_half(blocks, 82),
        (blocks[:, :16] >> np.uint8(4)).view(np.int8),
    )


def _q3_k(blocks: Bytes) -> Fields:
    """32 bytes of third bits; 2-bit values as in Q2_K; 12 bytes of 6-bit scales, minus 32, of 16
    elements each; their fp16 scale.

    Of the scales, low halves lie in 8 bytes as in Q4_0, and upper bits in 4.
    """
    low, high = _fields(blocks[:, 96:104], 8, 4), _fields(blocks[:, 104:108], 4, 2)
    steps = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
    third = _fields(blocks[:, :32], 32, 1) << np.uint8(2)
    return Fields(_fields(blocks[:, 32:96], 32, 2) | third, _half(blocks, 108), steps)


def _with_minima(blocks: Bytes, values: Bytes) -> Fields:
    """Of Q4_K and Q5_K: fp16 scales of scales and minima, which are taken away; 12 bytes of 6-bit
    scales and minima of 8 groups.

    Of the first 4 groups, scales are the low bits of 4 bytes and minima of the next 4. Of the
    others, the low halves lie in the last 4 bytes and the upper bits in those of the first groups.
    """
    for_scales, for_minima, shared = (blocks[:, 4 + 4 * part : 8 + 4 * part] for part in range(3))
    low, top, nibble = np.uint8(63), np.uint8(48), np.uint8(15)
    two, four = np.uint8(2), np.uint8(4)
    scales = (for_scales & low, for_scales >> two & top | shared & nibble)
    minima = (for_minima & low, for_minima >> two & top | shared >> four)
    return Fields(
        values,
        _half(blocks, 0),
        np.concatenate(scales, axis=1).view(np.int8),
        -_half(blocks, 2),
        np.concatenate(minima, axis=1).view(np.int8),
    )


def _q4_k(blocks: Bytes) -> Fields:
    """Scales and minima of 32 elements each; 4-bit values of each 64 elements in 32 bytes."""
    return _with_minima(blocks, _fields(blocks[:, 16:], 32, 4))


def _q5_k(blocks: Bytes) -> Fields:
    """As Q4_K, with 32 bytes of fifth bits before the values, whose bit i is of group i."""
    fifth = _fields(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return _with_minima(blocks, _fields(blocks[:, 48:], 32, 4) | fifth)


def _q6_k(blocks: Bytes) -> Fields:
    """Low 4 bits of each 128 elements in 64 bytes; upper 2 bits of each 128 in 32 bytes; int8
    scales of 16 elements each; their fp16 scale.
    """
    upper = _fields(blocks[:, 128:192], 32, 2) << np.uint8(4)
    values = _fields(blocks[:, :128], 64, 4) | upper
    return Fields(values, _half(blocks, 208), blocks[:, 192:208].view(np.int8))


def _iq4_xs(blocks: Bytes) -> Fields:
    """An fp16 scale; 2 bytes of upper bits and 4 of low halves of 6-bit scales, minus 32, of 32
    elements each; 4 bits that number a value of a table, of each 32 elements in 16 bytes.
    """
    upper, low = _fields(blocks[:, 2:4], 1, 2), _fields(blocks[:, 4:8], 1, 4)
    steps = (low | upper << np.uint8(4)).view(np.int8) - np.int8(32)
    return Fields(_fields(blocks[:, 8:], 16, 4), _half(blocks, 0), steps)


def _mxfp4(blocks: Bytes) -> Fields:
    """An exponent of 2, plus 127; 4 bits, as in Q4_0, that are FP4.

    The table holds twice the values, so the exponent is one less.
    """
    factors = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return Fields(_fields(blocks[:, 1:], 16, 4), factors)


F32 = BlockType(0, "F32", 1, 4, torch.float32)

BLOCK_TYPES = (
    F32,
    BlockType(1, "F16", 1, 2, torch.float16),
    BlockType(30, "BF16", 1, 2, torch.bfloat16),
    BlockType(8, "Q8_0", 32, 34, None, BlockLayout(8, 32, 128), _q8_0),
    BlockType(2, "Q4_0", 32, 18, None, BlockLayout(4, 32, 8), _q4_0),
    BlockType(3, "Q4_1", 32, 20, None, BlockLayout(4, 32), _q4_1),
    BlockType(6, "Q5_0", 32, 22, None, BlockLayout(5, 32, 16), _q5_0),
    BlockType(7, "Q5_1", 32, 24, None, BlockLayout(5, 32), _q5_1),
    BlockType(10, "Q2_K", 256, 84, None, BlockLayout(2, 16, super=16), _q2_k),
    BlockType(11, "Q3_K", 256, 110, None, BlockLayout(3, 16, 4, super=16), _q3_k),
    BlockType(12, "Q4_K", 256, 144, None, BlockLayout(4, 32, super=8), _q4_k),
    BlockType(13, "Q5_K", 256, 176, None, BlockLayout(5, 32, super=8), _q5_k),
    BlockType(14, "Q6_K", 256, 210, None, BlockLayout(6, 16, 32, super=16), _q6_k),
    BlockType(20, "IQ4_NL", 32, 18, None, BlockLayout(4, 32, table=_NON_LINEAR), _q4_0),
    BlockType(23, "IQ4_XS", 256, 136, None, BlockLayout(4, 32, 0, 8, _NON_LINEAR), _iq4_xs),
    BlockType(*(39, "MXFP4", 32, 17, None, BlockLayout(4, 32, table=FP4), _mxfp4, torch.bfloat16)),
)
"""All that are read."""

_BY_NUMBER = {type.number: type for type in BLOCK_TYPES}
_OTHER_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}
"""What files may hold and what is not read."""


def find_block_type(number: int) -> BlockType:
    """The type of that number. Raises CheckpointError that lists the known ones."""
    if number not in _BY_NUMBER:
        known = ", ".join(type.name for type in BLOCK_TYPES)
        raise CheckpointError(
            f"type {_OTHER_NAMES.get(number, number)} is not supported; take a file with others: "
            f"{known}"
        )
    return _BY_NUMBER[number]
