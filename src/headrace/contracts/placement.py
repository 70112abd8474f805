"""Weights and KV pages beyond memory: what is placed where, and in what order a step needs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.contracts.cache import CacheLayout
from headrace.contracts.method import Method, Property
from headrace.contracts.step import PlanRow
from headrace.disk import align

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(text: str) -> int:
    """``"512MiB"``, or a plain number of bytes, as a number of at least 1. Raises ValueError."""
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        count = float(text.removesuffix(unit)) * _UNITS[unit] if unit else int(text)
    except ValueError:
        count = 0
    if not 1 <= count < 1 << 62:
        raise ValueError(f"must be bytes, as in 512MiB or 536870912, got {text!r}")
    return int(count)


@dataclass(frozen=True, slots=True)
class Placement:
    """What lies on disk, and how a step goes over it.

    The inputs of a step are split into blocks of rows; all blocks pass a layer before the next
    layer begins. What a layer or block needs of the disk is read into one of ``slots`` buffers.

    Args:
        streamed: layers whose linear weights are on disk.
        spilled: layers whose KV pages are on disk.
        block_rows: rows of a block at most.
        block_pages: pages, of each cache group, that the rows of a block have together at most.
        slots: buffers of each kind: 1, or more so that one is filled while another is in use.
    """

    streamed: frozenset[int] = frozenset()
    spilled: frozenset[int] = frozenset()
    block_rows: int = 1 << 30
    block_pages: int = 1 << 30
    slots: int = 2

    @property
    def on_disk(self) -> bool:
        """Whether anything is."""
        return bool(self.streamed or self.spilled)

    def split(self, rows: Sequence[PlanRow], layout: CacheLayout) -> Iterator[list[PlanRow]]:
        """The blocks of a step, in order. No row is in two of them."""
        block: list[PlanRow] = []
        pages = 0
        for row in rows:
            held = layout.pages_for(row.slot + len(row.input_ids))
            if block and (len(block) == self.block_rows or pages + held > self.block_pages):
                yield block
                block, pages = [], 0
            block.append(row)
            pages += held
        yield block


LEFTOVERS = 16
"""One in so many bytes is taken beside what was asked for."""


@dataclass(frozen=True, slots=True)
class PlacementFacts:
    """What there is to place, and how fast it can be read.

    Args:
        fixed_bytes: always in memory: embeddings, output head, norms, biases, recurrent states,
            and what a step computes with.
        layer_bytes: linear weights of each layer.
        layout: of the KV cache.
        num_pages: of the KV cache, those of all groups.
        sequences: in one step at most.
        sequence_pages: of a group, those of one sequence at most.
        disk_bandwidth, memory_bandwidth: bytes per second.
    """

    fixed_bytes: int
    layer_bytes: tuple[int, ...]
    layout: CacheLayout
    num_pages: int
    sequences: int
    sequence_pages: int
    disk_bandwidth: float
    memory_bandwidth: float

    def weight_bytes(self, placement: Placement) -> int:
        """Memory for weights, buffers included."""
        resident = sum(n for i, n in enumerate(self.layer_bytes) if i not in placement.streamed)
        largest = max((self.layer_bytes[layer] for layer in placement.streamed), default=0)
        return resident + placement.slots * largest

    def cache_bytes(self, placement: Placement) -> int:
        """Memory for KV pages, buffers included."""
        resident = self.layout.without(placement.spilled).page_bytes
        sizes = [self.layout.layer_bytes(layer) for layer in placement.spilled]
        largest = align(max(sizes, default=0))
        staged = min(self.num_pages, placement.block_pages)
        return resident * self.num_pages + placement.slots * staged * largest

    def memory(self, placement: Placement) -> int:
        """Bytes in memory, what allocators round up and leave between pieces included."""
        known = self.fixed_bytes + self.weight_bytes(placement) + self.cache_bytes(placement)
        return known + known // LEFTOVERS


class PlacementMethod(Method):
    """Decides what of a model and its KV cache is in memory, under a cap, and what on disk.

    Attributes:
        directory: for files.
        direct: whether they are read and written past the page cache.
        overlap: whether reading goes on while layers compute.
    """

    __slots__ = ()
    kind_requires = frozenset({Property.IN_MEMORY})
    kind_breaks = frozenset({Property.IN_MEMORY})
    directory: str
    direct: bool
    overlap: bool

    @abstractmethod
    def place(self, facts: PlacementFacts) -> Placement:
        """Where everything goes. Raises ValueError if it does not fit, saying what would."""


class Tier(ABC):
    """Below memory. In each step, it brings what layers need, in the order in which they run.

    ``enter`` and ``leave`` come for every layer and, in it, for every block.
    """

    @property
    @abstractmethod
    def waited(self) -> float:
        """Seconds that layers have waited for what they need."""

    @abstractmethod
    def begin(self, blocks: int) -> None:
        """A step of so many blocks begins."""

    @abstractmethod
    def enter(self, layer: int, block: int) -> None:
        """Returns when what ``layer`` needs for ``block`` is there. Raises OSError."""

    @abstractmethod
    def leave(self, layer: int, block: int) -> None:
        """It has been computed."""

    @abstractmethod
    def end(self) -> None:
        """The step is over. Raises OSError if what it changed cannot be kept."""

    @abstractmethod
    def stop(self) -> None:
        """The step ended early, and what it changed is not needed."""

    @abstractmethod
    def close(self) -> None:
        """Give back files, memory and threads."""
