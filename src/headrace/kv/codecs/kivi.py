"""KIVI: keys quantized by channel, values by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, CodingSchedule, KVCodec
from headrace.contracts.method import MethodCard, Property
from headrace.kv.packed_bits import (
    dequantize_range,
    pack_bits,
    quantize_range,
    unpack_bits,
)


@dataclass(frozen=True, slots=True)
class Kivi(KVCodec):
    """Round groups of entries to evenly spaced levels (section 3.2).

    Keys in groups of tokens of one channel, values in groups of channels of one token; the newest
    tokens stay as they are (section 3.3).

    Args:
        bits: of an entry: 1, 2, 4 or 8.
        group: tokens, or channels, that share a scale and a zero.
        plain: newest tokens that are not coded.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        summary="Stores older keys and values in few bits: keys by channel, values by token.",
        guarantee="lossy",
        requires=frozenset(
            {Property.TOKEN_ORDER, Property.PLAIN_ENTRIES, Property.FED_TOKENS_STAY}
        ),
        breaks=frozenset({Property.PLAIN_ENTRIES}),
    )

    bits: int = 2
    group: int = 32
    plain: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits must be 1, 2, 4 or 8, got {self.bits}")
        if self.group not in (8, 16, 32, 64, 128):
            raise ValueError(f"group must be 8, 16, 32, 64 or 128, got {self.group}")
        if self.plain < 0:
            raise ValueError(f"plain must be at least 0, got {self.plain}")

    def schedule(self, block_size: int) -> CodingSchedule:
        unit, plain = (-(-x // block_size) * block_size for x in (self.group, self.plain))
        return CodingSchedule(unit, plain)

    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        # Of keys, the levels of a channel lie together; of values, those of a group of channels.
        size = min(self.group, width)
        shapes = {"key": (heads, width, unit), "value": (heads, unit * width // size, size)}
        return tuple(
            part
            for name, (count, lines, length) in shapes.items()
            for part in (
                CodedPart(f"{name}_levels", (count, lines, length * self.bits // 8), "uint8"),
                CodedPart(f"{name}_steps", (count, lines, 2), "float16"),
            )
        )

    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        coded = {}
        groups = values.unflatten(-1, (-1, min(self.group, values.shape[-1]))).flatten(1, 2)
        for name, lines in (("key", keys.mT), ("value", groups)):
            levels, step, lowest = quantize_range(lines, self.bits, -1)
            coded[f"{name}_levels"] = pack_bits(levels, self.bits)
            coded[f"{name}_steps"] = torch.cat((step, lowest), dim=-1)
        return coded

    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        keys, groups = (
            dequantize_range(
                unpack_bits(parts[f"{name}_levels"], self.bits),
                *parts[f"{name}_steps"].split(1, dim=-1),
            )
            for name in ("key", "value")
        )
        return keys.mT, groups.reshape(*keys.shape[:2], keys.shape[3], keys.shape[2])
