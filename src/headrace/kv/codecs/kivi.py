"""KIVI: keys quantized by channel, values by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, KVCodec
from headrace.contracts.method import MethodCard
from headrace.kv.packed_bits import decode_lines, pack_bits, quantize_range


@dataclass(frozen=True, slots=True)
class Kivi(KVCodec):
    """Round groups of entries to evenly spaced levels (section 3.2).

    Keys in groups of tokens of one channel, values in groups of channels of one token. What has
    come since the last unit stays as it is (section 3.3, the residual).

    Args:
        bits: of an entry: 1, 2, 4 or 8.
        group: tokens, or channels, that share a scale and a zero.
        unit: tokens that are coded together, in groups.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        summary="Stores older keys and values in few bits: keys by channel, values by token.",
        guarantee="lossy",
    )

    bits: int = 2
    group: int = 32
    unit: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits must be 1, 2, 4 or 8, got {self.bits}")
        if self.group not in (8, 16, 32, 64, 128):
            raise ValueError(f"group must be 8, 16, 32, 64 or 128, got {self.group}")
        if self.unit % self.group or not 8 <= self.unit <= 4096:
            raise ValueError(
                f"unit must be a multiple of the group, {self.group}, up to 4096, got {self.unit}"
            )

    def unit_slots(self, block_size: int) -> int:
        return -(-self.unit // block_size) * block_size

    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        # Of keys, the levels of a channel lie together; of values, those of a token.
        found = []
        for name, lines, length in (("key", width, unit), ("value", unit, width)):
            groups = length // self._group(length)
            levels = (heads, lines, groups, self._group(length) * self.bits // 8)
            found.append(CodedPart(f"{name}_levels", levels, "uint8"))
            found.append(CodedPart(f"{name}_steps", (heads, lines, groups, 2), "float16"))
        return tuple(found)

    def _group(self, length: int) -> int:
        return math.gcd(self.group, length)

    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        coded = {}
        for name, lines in (("key", keys.mT), ("value", values)):
            groups = lines.unflatten(-1, (-1, self._group(lines.shape[-1])))
            levels, step, lowest = quantize_range(groups, self.bits, -1)
            coded[f"{name}_levels"] = pack_bits(levels, self.bits)
            coded[f"{name}_steps"] = torch.cat((step, lowest), dim=-1)
        return coded

    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decode_lines(parts, self.bits)

    def level_bits(self) -> int:
        return self.bits
