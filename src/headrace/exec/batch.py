"""From a step plan to tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.method import Method
from headrace.contracts.placement import Placement
from headrace.contracts.step import PageTables, PlanRow
from headrace.exec.taps import TappedRows
from headrace.kv.arena import KVArena
from headrace.ops.paged import StepShape
from headrace.ops.recurrent import RowSpans
from headrace.ops.table import Ops


@dataclass(slots=True)
class ForwardBatch:
    """Inputs that go through the layers together.

    Args:
        input_ids, positions: ``[T]``.
        rows: which of them belong together.
        attention: one plan per cache group.
        adapted: keys of adapters, and the inputs ``[n]`` that go through each.
        tapped: name of a method with a tap -> the inputs that it is for.
        block: number of the rows' block in the step; see ``Placement``.
    """

    input_ids: Tensor
    positions: Tensor
    rows: RowSpans
    attention: list[Any]
    adapted: Sequence[tuple[str, Tensor]]
    tapped: Mapping[str, Sequence[TappedRows[Any]]]
    block: int = 0


class BatchBuilder:
    """Builds the micro-batches of a step: one, or one per token where ops are batch-invariant.

    Of models that are not causal, it is one per row: tokens see those behind them.

    Args:
        tapping: names of the methods that have taps.
        placement: says how rows are split into blocks.
    """

    def __init__(
        self,
        arena: KVArena,
        ops: Ops,
        causal: bool = True,
        tapping: Collection[str] = (),
        placement: Placement | None = None,
    ) -> None:
        self._placement = placement or Placement()
        self._arena = arena
        self._tapping = tapping
        self._ops = ops
        self._causal = causal
        self._groups = range(arena.num_tables)

    def build(self, rows: Sequence[PlanRow], tables: PageTables) -> list[ForwardBatch]:
        """The micro-batches, in the order in which they must run."""
        if not self._placement.on_disk:
            return self._build(rows, tables)
        batches = []
        for block, part in enumerate(self._placement.split(rows, self._arena.layout)):
            for batch in self._build(part, self._arena.tables_of(block, part, tables)):
                batch.block = block
                batches.append(batch)
        return batches

    def _build(self, rows: Sequence[PlanRow], tables: PageTables) -> list[ForwardBatch]:
        if not self._ops.batch_invariant:
            return [self._batch(rows, tables)]
        if not self._causal:
            return [self._batch([row], tables) for row in rows]
        return [
            self._batch([_single_input(row, index)], tables)
            for row in rows
            for index in range(len(row.input_ids))
        ]

    def _batch(self, rows: Sequence[PlanRow], tables: PageTables) -> ForwardBatch:
        ids = [token for row in rows for token in row.input_ids]
        positions = [position for row in rows for position in row.positions]
        lengths = np.array([len(row.input_ids) for row in rows])
        past = np.array([row.slot for row in rows])
        used = [row.table_row for row in rows]
        pages = self._arena.layout.pages_for(int((past + lengths).max()))
        plans = []
        for group in self._groups:
            plane = self._arena.group_plane(group)
            shape = StepShape.of_one_group(lengths, past, tables[group, used, :pages], plane.heads)
            plans.append(self._ops.attention.plan(shape, plane))
        spans = RowSpans(lengths.tolist(), used)
        ids_of, places = self._tensor(ids), self._tensor(positions)
        return ForwardBatch(ids_of, places, spans, plans, self._adapted(rows), self._tapped(rows))

    def _adapted(self, rows: Sequence[PlanRow]) -> list[tuple[str, Tensor]]:
        """The inputs that go through adapters, by adapter."""
        found: dict[str, list[int]] = {}
        place = 0
        for row in rows:
            count = len(row.input_ids)
            if row.adapter:
                found.setdefault(row.adapter, []).extend(range(place, place + count))
            place += count
        return [(key, self._tensor(inputs)) for key, inputs in found.items()]

    def _tapped(self, rows: Sequence[PlanRow]) -> dict[str, list[TappedRows[Any]]]:
        """The inputs of rows whose methods have taps, by method as the rows chose it."""
        found: dict[Method, tuple[list[int], list[int]]] = {}
        place = 0
        for row in rows:
            end = place + len(row.input_ids)
            for method in row.methods:
                if method.name() in self._tapping:
                    inputs, answering = found.setdefault(method, ([], []))
                    inputs.extend(range(place, end))
                    answering.extend(range(place + row.num_quiet, end))
            place = end
        tapped: dict[str, list[TappedRows[Any]]] = {}
        for method, (inputs, answering) in found.items():
            part = TappedRows(method, self._tensor(inputs), self._tensor(answering))
            tapped.setdefault(method.name(), []).append(part)
        return tapped

    def _tensor(self, values: list[int]) -> Tensor:
        array = np.array(values, dtype=np.int64)
        return torch.from_numpy(array).to(self._ops.device, non_blocking=True)


def _single_input(row: PlanRow, index: int) -> PlanRow:
    """The row reduced to its ``index``-th input; earlier inputs are its past by then."""
    return PlanRow(
        sequence=row.sequence,
        table_row=row.table_row,
        input_ids=row.input_ids[index : index + 1],
        positions=row.positions[index : index + 1],
        slot=row.slot + index,
        adapter=row.adapter,
        methods=row.methods,
        num_quiet=int(index < row.num_quiet),
    )
