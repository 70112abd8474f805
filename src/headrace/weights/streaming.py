"""Weights of layers that stay on disk, and are read into memory when their layer runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.placement import Tier
from headrace.disk import (
    ALIGNMENT,
    DiskFile,
    FilePlace,
    Rotation,
    align,
    aligned_memory,
    return_freed_memory,
)
from headrace.errors import ConfigurationError
from headrace.ops.block_weight import BlockWeight
from headrace.ops.linear import Linear, LinearOps, RMSNorm
from headrace.ops.packed_weight import BF16, PackedWeight, pack_dense, unpack_dense
from headrace.weights.absent_linear import AbsentLinear
from headrace.weights.counting import WeightCounter

_GAP = 64 << 10
"""Bytes between two tensors of a file that are read along, rather than in two reads."""

_TENSOR_ALIGNMENT = 64
_ABSENT = AbsentLinear("its layer does not run now")

Build = Callable[[Sequence[Tensor]], Linear]
"""Makes a weight ready that reads these tensors wherever they lie."""


def layer_of(name: str) -> int | None:
    """The layer that a weight belongs to: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


class LayerCounter(WeightCounter):
    """A ``WeightCounter`` that knows what each layer's linear weights take.

    Attributes:
        layer_bytes: layer -> bytes.
        largest: rows or columns of any linear weight of a layer.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.layer_bytes: dict[int, int] = {}
        self.largest = 0

    def linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, **options: Any
    ) -> Linear:
        """See ``WeightSource``."""
        before = self.num_bytes
        linear = super().linear(names, rows, columns, **options)
        layer = layer_of(names[0])
        if layer is not None:
            self.layer_bytes[layer] = self.layer_bytes.get(layer, 0) + self.num_bytes - before
            self.largest = max(self.largest, sum(rows), columns)
        return linear


class StreamedLinear(Linear):
    """A weight that can be multiplied with while its layer runs.

    Args:
        parts: where its tensors lie.
        build: makes it ready on tensors in a buffer; once for each buffer.
    """

    __slots__ = ("_current", "_versions", "build", "num_bytes", "parts")

    def __init__(self, parts: Sequence[StoredPart], build: Build, num_bytes: int) -> None:
        self.parts, self.build, self.num_bytes = parts, build, num_bytes
        self._versions: list[Linear] = []
        self._current: Linear = _ABSENT

    def bind(self, buffer: Tensor) -> None:
        """Make it ready in one more buffer, uint8 ``[bytes of a layer]``."""
        self._versions.append(self.build([part.view(buffer) for part in self.parts]))

    def use(self, slot: int | None) -> None:
        """Read it from the buffer ``slot`` from now on; from none: it is not there."""
        self._current = _ABSENT if slot is None else self._versions[slot]

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return self._current(x, norm=norm, residual=residual, out_dtype=out_dtype)

    def ungated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        return self._current.ungated(x, norm=norm)

    def rows(self, ids: Tensor) -> Tensor:
        return self._current.rows(ids)


@dataclass(slots=True)
class StoredPart:
    """A tensor in a file, and where it comes to lie in the buffer of its layer.

    Args:
        path: of the file; ``None``: the scratch file.
    """

    path: Path | None
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    place: int = -1

    def view(self, buffer: Tensor) -> Tensor:
        """It, in a buffer."""
        part = buffer[self.place : self.place + self.num_bytes]
        return part.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of a file, aligned, that are read into the buffer of a layer at ``place``.

    The last ``size - least`` of them may be behind the end of the file.
    """

    path: Path | None
    offset: int
    size: int
    least: int
    place: int


def arrange(parts: Sequence[StoredPart]) -> list[Segment]:
    """What is to be read of files for the tensors of a layer, which learn their places."""
    segments: list[Segment] = []
    place = 0
    for path, group in itertools.groupby(
        sorted(parts, key=lambda part: (str(part.path or ""), part.offset)), lambda part: part.path
    ):
        for run in _runs(list(group)):
            offset = run[0].offset // ALIGNMENT * ALIGNMENT
            least = max(part.offset + part.num_bytes for part in run) - offset
            segments.append(Segment(path, offset, align(least), least, place))
            for part in run:
                part.place = place + part.offset - offset
            place += align(least)
    return segments


def _runs(parts: Sequence[StoredPart]) -> Iterator[list[StoredPart]]:
    """Tensors that lie close together in a file."""
    run = [parts[0]]
    for part in parts[1:]:
        if part.offset - (run[-1].offset + run[-1].num_bytes) > _GAP:
            yield run
            run = []
        run.append(part)
    yield run


class WeightTier(Tier):
    """Linear weights of layers on disk, of which a few layers at a time are in memory.

    What a packed checkpoint holds is read from it; other weights are written into a scratch file
    as they are made ready. Layers are read round and round, in their order, since the next step
    begins where one ends.

    Args:
        layers: that are on disk.
        scratch: makes the scratch file, when there is something to write.
        direct: read past the page cache.
        slots: layers in memory at most.
        ahead: whether layers are read while others compute.
    """

    def __init__(
        self,
        layers: Collection[int],
        scratch: Callable[[], DiskFile],
        *,
        direct: bool,
        slots: int,
        ahead: bool,
    ) -> None:
        self.layers = frozenset(layers)
        self._make_scratch, self._direct = scratch, direct
        self._slots, self._ahead = slots, ahead
        self._files: dict[Path | None, DiskFile] = {}
        self._written = 0
        self._linears: dict[int, list[StreamedLinear]] = {layer: [] for layer in self.layers}
        self._segments: dict[int, list[Segment]] = {}
        self._buffers: list[memoryview] = []
        self._rotation: Rotation[int] | None = None
        self._blocks = 0
        self._passed = 0

    def keep(
        self,
        layer: int,
        tensors: Sequence[Tensor],
        build: Build,
        places: Sequence[FilePlace | None] | None = None,
    ) -> Linear:
        """A weight of ``layer`` out of these tensors, which are not needed any more.

        Args:
            places: where tensors lie in files already.

        Raises:
            ConfigurationError: it cannot be written.
            ValueError: there is no room for the scratch file.
        """
        # Tensors of many sizes come and go, and leave holes that would count against a cap.
        return_freed_memory()
        parts = []
        for index, tensor in enumerate(tensors):
            known = None if places is None else places[index]
            path = None if known is None else known.path
            offset = self._write(tensor) if known is None else known.offset
            shape = tuple(tensor.shape)
            parts.append(StoredPart(path, offset, tensor.dtype, shape, tensor.nbytes))
        linear = StreamedLinear(parts, build, sum(part.num_bytes for part in parts))
        self._linears[layer].append(linear)
        return linear

    def _write(self, tensor: Tensor) -> int:
        """Append a tensor to the scratch file; where it begins."""
        if None not in self._files:
            self._files[None] = self._make_scratch()
        offset = -(-self._written // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        try:
            self._files[None].write(data, offset)
        except OSError as error:
            raise ConfigurationError(
                f"weights cannot be written to disk ({error.strerror}); make room, or name "
                "another directory"
            ) from error
        self._written = offset + tensor.nbytes
        return offset

    def open(self) -> None:
        """Begin to read, when all weights have come.

        Raises:
            ValueError: files cannot be read past the page cache.
            OSError: a file cannot be opened.
        """
        return_freed_memory()
        for layer, linears in self._linears.items():
            self._segments[layer] = arrange([part for linear in linears for part in linear.parts])
        for segment in itertools.chain(*self._segments.values()):
            if segment.path not in self._files:
                assert segment.path is not None
                self._files[segment.path] = DiskFile.open(segment.path, self._direct)
        if None in self._files and self._direct:
            self._files[None].bypass_cache()
        size = max(sum(segment.size for segment in each) for each in self._segments.values())
        self._buffers = [aligned_memory(size) for _ in range(self._slots)]
        for buffer in self._buffers:
            memory = torch.frombuffer(buffer, dtype=torch.uint8)
            for linear in itertools.chain(*self._linears.values()):
                linear.bind(memory)
        self._rotation = Rotation(self._slots, self._read, self._ahead, "headrace-weights")

    def _read(self, slot: int, layer: int) -> None:
        for segment in self._segments[layer]:
            part = self._buffers[slot][segment.place : segment.place + segment.size]
            self._files[segment.path].read(part, segment.offset, segment.least)

    @property
    def waited(self) -> float:
        return 0.0 if self._rotation is None else self._rotation.waited

    @property
    def step_bytes(self) -> int:
        """Bytes that are read in a step."""
        return sum(segment.size for each in self._segments.values() for segment in each)

    def begin(self, blocks: int) -> None:
        self._blocks = blocks
        assert self._rotation is not None
        if self._passed == 0:
            self._rotation.start(itertools.cycle(sorted(self.layers)))

    def enter(self, layer: int, block: int) -> None:
        if layer not in self.layers or block > 0:
            return
        assert self._rotation is not None
        slot = self._rotation.take()
        for linear in self._linears[layer]:
            linear.use(slot)

    def leave(self, layer: int, block: int) -> None:
        if layer not in self.layers or block < self._blocks - 1:
            return
        assert self._rotation is not None
        for linear in self._linears[layer]:
            linear.use(None)
        self._rotation.give()

    def end(self) -> None:
        self._passed += 1

    def stop(self) -> None:
        assert self._rotation is not None
        self._rotation.stop()
        self._passed = 0
        for linear in itertools.chain(*self._linears.values()):
            linear.use(None)

    def close(self) -> None:
        if self._rotation is not None:
            self._rotation.close()
        for file in self._files.values():
            file.close()


class StreamingLinears(LinearOps):
    """Makes weights ready: those of layers on disk in a ``WeightTier``, others as ``base`` does.

    Raises:
        ValueError: ``base`` keeps dense weights where they cannot be read into.
    """

    def __init__(self, base: LinearOps, dtype: torch.dtype, tier: WeightTier) -> None:
        if base.dense_layout == "opaque":
            raise ValueError(
                "weights in the layout of oneDNN cannot be read from disk; use the native kernels "
                "or dtype float32"
            )
        self.keeps_blocks, self.dense_layout = base.keeps_blocks, base.dense_layout
        self._base, self._dtype, self._tier = base, dtype, tier
        self._layer: int | None = None
        self._places: Mapping[str, FilePlace] = {}

    def expect(self, name: str, places: Mapping[str, FilePlace] | None = None) -> None:
        self._places = places or {}
        layer = layer_of(name)
        self._layer = layer if layer in self._tier.layers else None

    def dense(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        indexed: bool = False,
    ) -> Linear:
        if self._layer is None:
            return self._base.dense(weight, bias, gated=gated, indexed=indexed)
        if self.dense_layout == "packed":
            return self.packed(pack_dense(weight, gated), bias)

        def build(tensors: Sequence[Tensor]) -> Linear:
            return self._base.dense(tensors[0], bias, gated=gated, indexed=indexed)

        return self._tier.keep(self._layer, [weight], build)

    def packed(self, weight: PackedWeight, bias: Tensor | None = None) -> Linear:
        if self._layer is None:
            return self._base.packed(weight, bias)
        if weight.format == BF16 and self.dense_layout == "plain":
            return self.dense(unpack_dense(weight).to(self._dtype), bias, gated=weight.gated)
        names, tensors = list(weight.parts()), list(weight.parts().values())
        places = [self._places.get(name) for name in names]
        empty = weight.to("meta")

        def build(views: Sequence[Tensor]) -> Linear:
            named: dict[str, Any] = dict(zip(names, views, strict=True))
            return self._base.packed(replace(empty, **named), bias)

        return self._tier.keep(self._layer, tensors, build, places)

    def blocks(self, weight: BlockWeight, bias: Tensor | None = None) -> Linear:
        if self._layer is None:
            return self._base.blocks(weight, bias)
        tensors: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.to("meta")

        # Any change visits the tensors in one order.
        empty = weight.map(note)

        def build(views: Sequence[Tensor]) -> Linear:
            rest = iter(views)
            return self._base.blocks(empty.map(lambda _: next(rest)), bias)

        return self._tier.keep(self._layer, tensors, build)
