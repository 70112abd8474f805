"""What stores older keys and values in fewer bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from headrace.contracts.cache import ALIGNMENT, ITEM_BYTES
from headrace.contracts.method import Method, ModelFacts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class CodedPart:
    """One tensor of what a codec makes of a unit of slots in one layer.

    Args:
        shape, dtype: of the tensor, by torch's name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes in a page, up to where the next part may begin."""
        size = prod(self.shape) * ITEM_BYTES[self.dtype]
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class CodingSchedule:
    """Which slots of a sequence are coded: a function of the tokens that it has fed.

    Whenever there are ``plain + unit`` slots as they are, the oldest ``unit`` are coded together.
    No step feeds beyond such a point, so that what is coded does not depend on the chunks that a
    text is read in.

    Args:
        unit: slots that are coded together.
        plain: newest slots that stay as they are.
    """

    unit: int
    plain: int

    def is_due(self, fed: int) -> bool:
        """Whether a unit is coded when so many tokens have been fed."""
        return fed >= self.plain + self.unit and (fed - self.plain) % self.unit == 0

    def next_stop(self, fed: int) -> int:
        """How many tokens may have been fed, at most, when the step ends."""
        return self.plain + (max(0, fed - self.plain) // self.unit + 1) * self.unit

    def units(self, fed: int) -> int:
        """How many units are coded of a sequence that has fed so many tokens."""
        return max(0, fed - self.plain) // self.unit


class KVCodec(Method):
    """Stores all but the newest keys and values of a sequence in fewer bytes.

    Keys are coded as they are cached, rotated. A unit is coded once and never again; its pages are
    shared as others are.
    """

    __slots__ = ()

    def check(self, model: ModelFacts) -> None:
        """It needs a model that generates, of whose tokens every layer keeps keys and values."""
        if not model.causal:
            raise ValueError("needs a model that generates; this one reads texts as a whole")
        for layer in model.layers:
            names = {plane.name for plane in layer.planes}
            if layer.window is not None or names != {"key", "value"}:
                raise ValueError(
                    "needs layers that keep plain keys and values of all tokens; some here have a "
                    "window, int8 entries, a latent or a state"
                )

    @abstractmethod
    def schedule(self, block_size: int) -> CodingSchedule:
        """What is coded when; ``unit`` and ``plain`` are multiples of ``block_size``."""

    @abstractmethod
    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        """What a unit becomes in a layer of so many KV heads of that width."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        """Code a unit, fp32 ``[heads, unit, width]`` each; the parts by their names."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values, fp32 ``[n, heads, unit, width]``, of parts ``[n, *shape]``."""
