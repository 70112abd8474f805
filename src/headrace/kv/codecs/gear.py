"""GEAR: few bits for all entries, a low-rank matrix for their error, outliers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, KVCodec
from headrace.contracts.method import MethodCard
from headrace.kv.packed_bits import decode_lines, dequantize_range, pack_bits, quantize_range

ITERATIONS = 3
"""Of the power method, from a fixed beginning."""


@dataclass(frozen=True, slots=True)
class Gear(KVCodec):
    """Quantize keys by channel and values by token, and mend what that costs (section 3).

    Of each channel of the keys and each token of the values, the smallest and largest entries are
    taken out and kept; the rest is rounded to ``bits``; the error of each head is approximated by a
    matrix of low rank, found by the power method.

    Args:
        bits: of an entry: 2, 4 or 8.
        rank: of the matrix, 0 for none.
        outliers: share of the entries that are kept.
        unit: tokens that are coded together.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative "
        "Inference of LLM",
        summary="Stores older keys and values in few bits, mended by low rank and outliers.",
        guarantee="lossy",
    )

    bits: int = 4
    rank: int = 2
    outliers: float = 0.02
    unit: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, got {self.bits}")
        if not 0 <= self.rank <= 16:
            raise ValueError(f"rank must be between 0 and 16, got {self.rank}")
        if not 0 <= self.outliers <= 0.2:
            raise ValueError(f"outliers must be between 0 and 0.2, got {self.outliers}")
        if not 8 <= self.unit <= 4096:
            raise ValueError(f"unit must be between 8 and 4096, got {self.unit}")

    def unit_slots(self, block_size: int) -> int:
        return -(-self.unit // block_size) * block_size

    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        found = []
        # Of keys, the levels of a channel lie together; of values, those of a token.
        for name, lines, length in (("key", width, unit), ("value", unit, width)):
            kept = self._kept(length)
            found += [
                CodedPart(f"{name}_levels", (heads, lines, length * self.bits // 8), "uint8"),
                CodedPart(f"{name}_steps", (heads, lines, 2), "float16"),
                CodedPart(f"{name}_places", (heads, lines, kept), "int16"),
                CodedPart(f"{name}_outliers", (heads, lines, kept), "float16"),
                CodedPart(f"{name}_left", (heads, lines, self.rank), "float16"),
                CodedPart(f"{name}_right", (heads, self.rank, length), "float16"),
            ]
        return tuple(part for part in found if 0 not in part.shape)

    def _kept(self, length: int) -> int:
        """Outliers of a line: as many low ones as high ones."""
        return 2 * round(length * self.outliers / 2)

    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        coded = {}
        for name, lines in (("key", keys.mT), ("value", values)):
            for part, tensor in self._encode(lines).items():
                coded[f"{name}_{part}"] = tensor
        return coded

    def _encode(self, lines: Tensor) -> dict[str, Tensor]:
        """Lines ``[heads, lines, length]`` that are quantized each for itself."""
        coded = {}
        length = lines.shape[-1]
        half = self._kept(length) // 2
        lines = rest = lines.contiguous()
        if half:
            ends = [lines.topk(half, largest=largest, sorted=False) for largest in (False, True)]
            outliers, places = (torch.cat(pair, dim=-1) for pair in zip(*ends, strict=True))
            coded["places"] = places.to(torch.int16)
            coded["outliers"] = outliers.half()
            # A value that the line has anyway takes the place of what is taken out.
            middle = lines.kthvalue(length // 2 + 1, dim=-1, keepdim=True).values
            rest = lines.scatter(-1, places, middle.expand_as(places).contiguous())
        levels, step, lowest = quantize_range(rest, self.bits, -1)
        coded["levels"] = pack_bits(levels, self.bits)
        coded["steps"] = torch.cat((step, lowest), dim=-1)
        if self.rank:
            error = rest - dequantize_range(levels, step, lowest)
            coded["left"], coded["right"] = low_rank(error, self.rank)
        return coded

    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decode_lines(parts, self.bits)

    def level_bits(self) -> int:
        return self.bits


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """fp16 ``[..., m, rank]`` and ``[..., rank, n]`` whose product is near ``x`` ``[..., m, n]``.

    The power method (appendix of the paper), from a fixed random beginning: the same ``x`` always
    gives the same.
    """
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(x.shape[-1], rank, generator=generator).to(x).expand(*x.shape[:-2], -1, -1)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(x @ right).Q
        right = x.mT @ left
    return left.half(), right.mT.half()
