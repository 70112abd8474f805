"""A codec that changes nothing: what engines are tested with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headrace.contracts.kv_codec import CodedPart, KVCodec
from headrace.contracts.method import MethodCard

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlainUnits(KVCodec):
    """Says that units take so many bytes of each page that they had."""

    card: ClassVar[MethodCard] = MethodCard(
        title="",
        summary="Changes nothing.",
        guarantee="exact",
    )

    blocks: int = 3
    pages: int = 1

    def unit_slots(self, block_size: int) -> int:
        return self.blocks * block_size

    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        return tuple(CodedPart(f"part {i}", (96,), "uint8") for i in range(self.pages))

    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        raise NotImplementedError("there are no tensors in simulations")

    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("there are no tensors in simulations")
