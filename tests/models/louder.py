"""A codec whose units are unlike what they were, and the same whatever was rounded before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, KVCodec
from headrace.contracts.method import MethodCard


@dataclass(frozen=True, slots=True)
class Louder(KVCodec):
    """Keys and values in 16 bits, of which values come back larger."""

    card: ClassVar[MethodCard] = MethodCard("", "Makes values larger.", "lossy")

    unit: int = 16

    def unit_slots(self, block_size: int) -> int:
        return self.unit

    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        shape = (heads, unit, width)
        return tuple(CodedPart(name, shape, "float16") for name in ("key", "value"))

    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        return {"key": keys.half(), "value": values.half()}

    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parts["key"].float(), 1.5 * parts["value"].float()
