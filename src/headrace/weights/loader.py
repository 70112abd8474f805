"""From a checkpoint's tensors to a model's parameters, on the device and ready for products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.contracts.load_map import LoadMap
from headrace.errors import ConfigurationError
from headrace.ops.arranged_linear import JoinedLinear, PermutedLinear
from headrace.ops.linear import Linear, LinearOps
from headrace.ops.packed_weight import BF16, PackedWeight, WeightFormat, part_shapes
from headrace.ops.scale_search import make_scale_search
from headrace.ops.table import Ops
from headrace.weights.adapters import AdapterBank
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.formats import WeightPlan
from headrace.weights.quantizers import Quantizer, make_quantizer, pack_weight
from headrace.weights.reader import Progress, Stack, WeightReader
from headrace.weights.stored_blocks import Piece, pack_stored, split_stack


class CheckpointLoader(ABC):
    """The ``WeightSource`` of a checkpoint; counts what it loads.

    Attributes:
        plan: formats of the weights that it makes.
        num_bytes, head_bytes: in memory, of all parameters and of the output head.
        mapped_bytes: of ``num_bytes``, those of the checkpoint's mapped files.
        kept: parameters of linear weights that are kept as they are stored, by what that is.
        head_kept: what the output head is stored as, if it is one of them.
        bank: the linear weights that adapters can change.
    """

    def __init__(self, reader: WeightReader, ops: Ops, plan: WeightPlan) -> None:
        self.plan = plan
        self.num_parameters = self.num_bytes = self.head_bytes = self.mapped_bytes = 0
        self.kept: Counter[str] = Counter()
        self.head_kept: str | None = None
        self.bank = AdapterBank(ops)
        self._reader = reader
        self._ops = ops

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter ``[size]`` in the compute dtype."""
        self.num_parameters += size
        return self._own(self._reader.read(name, (size,)), self._ops.dtype)

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """Rows of the table ``name + ".weight"``, ``[rows, columns]``, in the compute dtype."""
        self.num_parameters += rows * columns
        table = self._table(f"{name}.weight", (rows, columns))
        dtype = self._ops.dtype
        return lambda ids: F.embedding(ids, table).to(dtype)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of any shape."""
        self.num_parameters += math.prod(shape)
        return self._own(self._reader.read(name, tuple(shape)), dtype or self._ops.dtype)

    def head(self, name: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
        """The output head, whose rows can be looked up."""
        stack = Stack([name], [rows], columns, bias)
        linear = self._counted(stack, self.plan.head, indexed=True)
        pieces = stored_pieces(self._reader, stack, self._ops.linears, self.plan.head)
        self.head_kept = self._reader.kinds(stack)[0] if pieces else None
        self.head_bytes = linear.num_bytes
        return linear

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        gated: bool = False,
        order: Sequence[int] | None = None,
        adaptable: bool = True,
    ) -> Linear:
        """One product for the weights ``names``, stacked along their rows."""
        stack = Stack(names, rows, columns, bias, gated, order)
        linear = self._counted(stack, self.plan.body)
        return self.bank.adapt(linear, stack) if adaptable else linear

    def _counted(self, stack: Stack, format: WeightFormat | None, indexed: bool = False) -> Linear:
        self._ops.linears.expect(stack.name)
        linear = self._linear(stack, format, indexed)
        self.num_parameters += stack.num_parameters
        self.num_bytes += linear.num_bytes
        return linear

    @abstractmethod
    def _linear(self, stack: Stack, format: WeightFormat | None, indexed: bool) -> Linear:
        """A weight made ready."""

    @abstractmethod
    def _table(self, name: str, shape: tuple[int, int]) -> Tensor:
        """An embedding as it is kept, counted."""

    def _own(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device, counted."""
        owned = stored.to(self._ops.device, dtype)
        self.num_bytes += owned.nbytes
        return owned


class WeightLoader(CheckpointLoader):
    """Of a checkpoint with plain weights, quantized on the way where that is asked for.

    No more than one stack of weights is in memory beside what was made ready before. Integers of
    other programs are kept where the operations take them and no other format is asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load_map: LoadMap,
        ops: Ops,
        plan: WeightPlan | None = None,
        progress: Progress | None = None,
        quantizer: Quantizer | None = None,
    ) -> None:
        plan = (plan or WeightPlan()).completed()
        super().__init__(WeightReader(checkpoint, load_map, progress), ops, plan)
        self._quantizer = quantizer

    def _linear(self, stack: Stack, format: WeightFormat | None, indexed: bool) -> Linear:
        bias = self._reader.bias(stack)
        if bias is not None:
            bias = self._own(bias, self._ops.dtype)
        pieces = stored_pieces(self._reader, stack, self._ops.linears, format)
        if pieces:
            return self._kept(stack, pieces, bias)
        weight = self._reader.weight(stack)
        if format is not None and format != BF16:
            if self._quantizer is None:
                self._quantizer = make_quantizer(make_scale_search(self._ops.threads))
            packed = pack_weight(weight, format, stack.gated, self._quantizer)
            return self._ops.linears.packed(packed.to(self._ops.device), bias)
        if format == BF16:
            weight = weight.bfloat16()
        return self._dense(weight, bias, stack.gated, indexed)

    def _dense(self, weight: Tensor, bias: Tensor | None, gated: bool, indexed: bool) -> Linear:
        weight = weight.to(self._ops.device, self._ops.dtype)
        return self._ops.linears.dense(weight, bias, gated=gated, indexed=indexed)

    def _kept(self, stack: Stack, pieces: Sequence[Piece], bias: Tensor | None) -> Linear:
        """A product with integers as they are stored, or several for parts of its rows."""
        if len(pieces) == 1:
            order = None if stack.order is None else torch.tensor(stack.order)
            return self._blocks(stack, pieces[0], bias, stack.gated, order)
        parts: list[Linear] = []
        row = 0
        for piece in pieces:
            part = stack.part(piece.first, piece.end)
            offsets = None if bias is None else bias[row : row + part.total]
            row += part.total
            if piece.blocks:
                parts.append(self._blocks(part, piece, offsets, False, None))
            else:
                parts.append(self._dense(self._reader.weight(part), offsets, False, False))
        return JoinedLinear(parts, stack.gated, self._ops.silu_and_mul)

    def _blocks(
        self,
        stack: Stack,
        piece: Piece,
        bias: Tensor | None,
        gated: bool,
        order: Tensor | None,
    ) -> Linear:
        weight = pack_stored(piece.blocks, gated, order)
        for kind, rows in zip(self._reader.kinds(stack), stack.rows, strict=True):
            self.kept[kind] += rows * stack.columns
        self._reader.count(stack.total * stack.columns * torch.float32.itemsize)
        linear = self._ops.linears.blocks(weight.to(self._ops.device), bias)
        columns = piece.blocks[0].order
        return linear if columns is None else PermutedLinear(linear, columns)

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """See ``CheckpointLoader``; integers are kept as those of other weights."""
        stack = Stack([name], [rows], columns)
        if not stored_pieces(self._reader, stack, self._ops.linears, self.plan.body):
            return super().embedding(name, rows, columns)
        return self._counted(stack, None, indexed=True).rows

    def _table(self, name: str, shape: tuple[int, int]) -> Tensor:
        # Beside weights in some format, it is what a packed checkpoint holds.
        dtype = self._ops.dtype if self.plan.body is None else torch.bfloat16
        return self._own(self._reader.read(name, shape), dtype)


class PackedLoader(CheckpointLoader):
    """Of a checkpoint in the packed layout: on the CPU, large tensors stay in the mapped file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        plan: WeightPlan,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(WeightReader(checkpoint, LoadMap(), progress), ops, plan)

    def _linear(self, stack: Stack, format: WeightFormat | None, indexed: bool) -> Linear:
        assert format is not None
        name, bias = stack.name, None
        if stack.bias:
            bias = self._own(self._reader.read(f"{name}.bias", (stack.total,)), self._ops.dtype)
        shapes = part_shapes(format, stack.total, stack.columns, stack.gated)
        parts = {
            part: self._mapped(f"{name}.{part}", shape, dtype)
            for part, (dtype, shape) in shapes.items()
        }
        found = {part: self._reader.place(f"{name}.{part}") for part in parts}
        places = {part: place for part, place in found.items() if place is not None}
        self._ops.linears.expect(name, places)
        packed = PackedWeight(format, stack.total, stack.columns, stack.gated, **parts)
        return self._ops.linears.packed(packed, bias)

    def _table(self, name: str, shape: tuple[int, int]) -> Tensor:
        table = self._mapped(name, shape, torch.bfloat16)
        self.num_bytes += table.nbytes
        return table

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the device; that is the file itself where the device can read it."""
        stored = self._reader.view(name, shape, dtype)
        kept = stored.to(self._ops.device)
        if kept is stored:
            self.mapped_bytes += stored.nbytes
        return kept


def stored_pieces(
    reader: WeightReader, stack: Stack, linears: LinearOps, format: WeightFormat | None
) -> list[Piece]:
    """How a stack is put together of integers as they are stored; empty if it is not."""
    if format is not None or not linears.keeps_blocks:
        return []
    pieces = split_stack(reader.blocks(stack))
    # Rows that change places over several products would have to be put together again.
    mixed = len(pieces) > 1 and stack.order is not None
    return [] if mixed or not any(piece.blocks for piece in pieces) else pieces


def plan_weights(checkpoint: Checkpoint, asked: WeightPlan) -> WeightPlan:
    """The formats that weights will have: what is asked for, or what a packed checkpoint has.

    Raises:
        CheckpointError: the checkpoint is quantized in a way that is not read.
        ConfigurationError: it is packed in other formats than those asked for.
    """
    stored = WeightPlan.stored(checkpoint.config)
    if stored is None:
        return asked.completed()
    for field, wanted, found in (
        ("weights", asked.body, stored.body),
        ("head_weights", asked.head, stored.head),
    ):
        if wanted is not None and wanted != found:
            assert found is not None
            raise ConfigurationError(
                f"{field}: the checkpoint is packed as {found.name}, not {wanted.name}; leave the "
                "option out, or quantize the original model"
            )
    return stored


def make_loader(
    checkpoint: Checkpoint,
    load_map: LoadMap,
    ops: Ops,
    asked: WeightPlan,
    progress: Progress | None = None,
) -> CheckpointLoader:
    """The loader for a checkpoint in the formats that are asked for; raises as ``plan_weights``."""
    plan = plan_weights(checkpoint, asked)
    if WeightPlan.stored(checkpoint.config) is None:
        return WeightLoader(checkpoint, load_map, ops, plan, progress)
    return PackedLoader(checkpoint, ops, plan, progress)
