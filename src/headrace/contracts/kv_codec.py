"""What stores older keys and values in fewer bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from headrace.contracts.cache import ALIGNMENT, ITEM_BYTES, CacheGroup, CacheLayout, layout_of
from headrace.contracts.method import Method, ModelFacts, Property

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


class KVCodec(Method):
    """Stores keys and values in fewer bytes, a unit of tokens at a time.

    Whenever a unit is full it is coded as a whole, and never again; the tokens behind the last
    one are cached as they are. No step feeds beyond the end of a unit, so that what a token sees
    does not depend on the chunks that a text is read in. Keys are coded as they are cached,
    rotated. Units are shared by their tokens as pages are.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.PLAIN_ENTRIES,
            Property.TOKEN_ORDER,
            Property.FULL_DEPTH,
            Property.FED_TOKENS_STAY,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.PLAIN_ENTRIES})

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
        coded_units(self, layout_of(model.layers, model.block_size, model.stages))

    @abstractmethod
    def unit_slots(self, block_size: int) -> int:
        """Slots of a unit, a multiple of ``block_size``."""

    @abstractmethod
    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        """What a unit becomes in a layer of so many KV heads of that width."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        """Code a unit, fp32 ``[heads, unit, width]`` each; the parts by their names."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values, fp32 ``[n, heads, unit, width]``, of parts ``[n, *shape]``."""

    def level_bits(self) -> int | None:
        """Bits of a level if the parts are lines of levels, which kernels decode; else ``None``.

        Of keys, the entries of a channel are a line; of values, those of a token. An entry is
        ``level * step + lowest``, plus ``left @ right`` if there are such parts; outliers, if there
        are any, replace what is at their places. Names are these behind ``key_`` and ``value_``:

        - ``levels``: uint8 ``[heads, lines, length * bits / 8]``, the first of a byte in its lowest
          bits; ``steps``: fp16 ``[heads, lines, groups, 2]``: step and lowest entry of each group
          of a line. The last dimensions of both may be split or joined.
        - ``left``, ``right``: fp16 ``[heads, lines, rank]`` and ``[heads, rank, length]``.
        - ``places``, ``outliers``: int16 and fp16 ``[heads, lines, kept]``.
        """
        return None


@dataclass(frozen=True, slots=True)
class CodedPlace:
    """Where a part of a layer is in the pages of a unit.

    Args:
        page: of the unit's; offset: in bytes, from its beginning.
    """

    part: CodedPart
    page: int
    offset: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class CodedUnit:
    """A unit of the layers of a cache group as the arena stores it: so many pages, and where they
    have what of each layer.
    """

    slots: int
    pages: int
    places: Mapping[int, Sequence[CodedPlace]]


def coded_units(codec: KVCodec, layout: CacheLayout) -> tuple[CodedUnit, ...]:
    """How units of a codec lie in pages of a layout, for each of its groups.

    Raises:
        ValueError: a part is larger than a page, or units take no fewer pages than they did.
    """
    return tuple(_coded_unit(codec, layout, group) for group in layout.groups)


def _coded_unit(codec: KVCodec, layout: CacheLayout, group: CacheGroup) -> CodedUnit:
    """Each part lies where there is room first."""
    slots = codec.unit_slots(layout.block_size)
    used: list[int] = []
    places: dict[int, list[CodedPlace]] = {}
    for layer, planes in zip(group.layers, group.planes, strict=True):
        for part in codec.parts(planes[0].heads, slots, planes[0].width):
            size = part.num_bytes
            if size > layout.page_bytes:
                raise ValueError(
                    f"a unit of {slots} tokens does not fit pages of {layout.page_bytes} bytes; "
                    "make units shorter, or raise block_size"
                )
            page = next((i for i, n in enumerate(used) if n + size <= layout.page_bytes), len(used))
            if page == len(used):
                used.append(0)
            places.setdefault(layer, []).append(CodedPlace(part, page, used[page]))
            used[page] += size
    if len(used) >= layout.pages_for(slots):
        raise ValueError(
            f"{slots} tokens take {len(used)} pages coded and {layout.pages_for(slots)} as they "
            "are; make units longer"
        )
    return CodedUnit(slots, len(used), places)
