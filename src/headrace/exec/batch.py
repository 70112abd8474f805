"""From a step plan to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.method import Method
from headrace.contracts.step import PageTables, PlanRow
from headrace.exec.coded_past import coded_rows
from headrace.exec.extensions import Extensions
from headrace.exec.segments import SegmentReads, pages_from, read_segments
from headrace.exec.slot_statistics import ObservedRow
from headrace.exec.taps import TappedRows
from headrace.kv.arena import KVArena
from headrace.models.base import NeuronStep
from headrace.ops.coded_attention import CodedRows
from headrace.ops.paged import Indices, StepShape
from headrace.ops.recurrent import RowSpans
from headrace.ops.table import Ops


@dataclass(slots=True)
class ForwardBatch:
    """Inputs that go through the layers together.

    Args:
        input_ids, positions: ``[T]``.
        rows: which of them belong together.
        past: int64 ``[R]``: slots before the inputs of each row, where groups do not differ.
        attention: one plan per cache group; ``None`` for those of no layer that is to come.
        adapted: keys of adapters, and the inputs ``[n]`` that go through each.
        tapped: name of a method with a tap -> the inputs that it is for.
        observed: the rows whose attention is noted.
        summed: whether sums of the attention that slots get are to be had for them: they suffice,
            and are not mostly those of other rows.
        segments: what inputs read beside the own context of their rows.
        coded: the rows with coded units before their own slots, for each cache group, if any has.
        neurons: which inputs go through some neurons only, if any do.
        block: number of the rows' block in the step; see ``Placement``.
    """

    input_ids: Tensor
    positions: Tensor
    rows: RowSpans
    past: Indices
    attention: list[Any]
    adapted: Sequence[tuple[str, Tensor]]
    tapped: Mapping[str, Sequence[TappedRows[Any]]] = field(default_factory=dict)
    observed: Sequence[ObservedRow] = ()
    summed: bool = False
    segments: SegmentReads | None = None
    coded: Sequence[Sequence[CodedRows]] = ()
    neurons: NeuronStep | None = None
    block: int = 0


class BatchBuilder:
    """Builds the micro-batches of a step: one, or one per token where ops are batch-invariant.

    Of models that are not causal, it is one per row: tokens see those behind them.

    Args:
        extensions: whose rows are told apart, and whose placement splits them into blocks.
    """

    def __init__(
        self,
        arena: KVArena,
        ops: Ops,
        causal: bool = True,
        extensions: Extensions | None = None,
    ) -> None:
        self._extensions = extensions or Extensions()
        self._placement = self._extensions.placed.placement
        self._arena = arena
        self._ops = ops
        self._causal = causal
        self._groups = range(arena.num_tables)

    def build(
        self, rows: Sequence[PlanRow], tables: PageTables, first: int = 0
    ) -> list[ForwardBatch]:
        """The micro-batches, in the order in which they must run, for layers from ``first`` on."""
        if not self._placement.on_disk:
            return self._build(rows, tables, first)
        batches = []
        for block, part in enumerate(self._placement.split(rows, self._arena.layout)):
            for batch in self._build(part, self._arena.tables_of(block, part, tables), first):
                batch.block = block
                batches.append(batch)
        return batches

    def _build(self, rows: Sequence[PlanRow], tables: PageTables, first: int) -> list[ForwardBatch]:
        if not self._ops.batch_invariant:
            return [self._batch(rows, tables, first)]
        if not self._causal:
            return [self._batch([row], tables, first) for row in rows]
        return [
            self._batch([_single_input(row, index)], tables, first)
            for row in rows
            for index in range(len(row.input_ids))
        ]

    def _batch(self, rows: Sequence[PlanRow], tables: PageTables, first: int) -> ForwardBatch:
        ids = [token for row in rows for token in row.input_ids]
        positions = [position for row in rows for position in row.positions]
        lengths = np.array([len(row.input_ids) for row in rows])
        past = np.array([row.slot - row.begin for row in rows])
        # Only methods let rows begin later, or have other slots in each group.
        extended = any(row.methods for row in rows)
        begins = np.array([row.begin for row in rows]) if extended else None
        differ = extended and any(row.slots is not None for row in rows)
        used = [row.table_row for row in rows]
        size = self._arena.layout.block_size
        plans: list[Any] = [None] * len(self._groups)
        for group in self._arena.groups_from(first) if first else self._groups:
            plane = self._arena.group_plane(group)
            slots = slots_of_group(rows, group) if differ else past
            pages = pages_from(tables[group], used, begins, slots + lengths, size)
            shape = StepShape.of_one_group(lengths, slots, pages, plane.heads)
            plans[group] = self._ops.attention.plan(shape, plane)
        batch = ForwardBatch(
            self._tensor(ids),
            self._tensor(positions),
            RowSpans(lengths.tolist(), used),
            past,
            plans,
            self._adapted(rows),
        )
        if extended:
            self._extend(batch, rows, tables)
        return batch

    def _extend(self, batch: ForwardBatch, rows: Sequence[PlanRow], tables: PageTables) -> None:
        """Add what methods of the rows need."""
        batch.tapped = self._tapped(rows)
        batch.observed = self._observed(rows, tables)
        batch.segments = read_segments(
            rows, tables, self._arena, self._ops.attention, self._ops.device
        )
        if any(row.coded is not None for row in rows):
            batch.coded = coded_rows(rows, len(self._groups))
        plain = batch.segments is None and not batch.coded
        batch.summed = plain and _sums_pay(batch, rows)
        neurons = self._extensions.neurons
        if neurons is not None:
            batch.neurons = neurons.step(rows, self._arena, bool(batch.adapted))

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
                if method.name() in self._extensions.taps:
                    inputs, answering = found.setdefault(method, ([], []))
                    inputs.extend(range(place, end))
                    answering.extend(range(place + row.num_quiet, end))
            place = end
        tapped: dict[str, list[TappedRows[Any]]] = {}
        for method, (inputs, answering) in found.items():
            part = TappedRows(method, self._tensor(inputs), self._tensor(answering))
            tapped.setdefault(method.name(), []).append(part)
        return tapped

    def _observed(self, rows: Sequence[PlanRow], tables: PageTables) -> list[ObservedRow]:
        """The rows whose attention is noted."""
        found, start, first_slot = [], 0, 0
        for row in rows:
            count = len(row.input_ids)
            if row.observer is not None:
                columns = self._arena.layout.pages_for(row.slot + count)
                pages = [
                    self._tensor(tables[group, row.table_row, :columns].tolist())
                    for group in self._groups
                ]
                found.append(
                    ObservedRow(
                        row.observer, row.table_row, start, count, row.slot, first_slot, pages
                    )
                )
            start += count
            first_slot += row.slot - row.begin + count
        return found

    def _tensor(self, values: list[int]) -> Tensor:
        array = np.array(values, dtype=np.int64)
        return torch.from_numpy(array).to(self._ops.device, non_blocking=True)


def _sums_pay(batch: ForwardBatch, rows: Sequence[PlanRow]) -> bool:
    """See ``ForwardBatch.summed``; the sums are of all rows, or of none."""
    if not batch.observed or any(row.slots is not None for row in rows):
        return False
    own = sum(row.past + row.queries for row in batch.observed)
    every = int(batch.past.sum()) + sum(batch.rows.lengths)
    return 2 * own >= every and all(row.sums_suffice for row in batch.observed)


def slots_of_group(rows: Sequence[PlanRow], group: int) -> Indices:
    """``[R]``: slots before the inputs of each row in a cache group, from where it begins."""
    return np.array([row.slot_in(group) - row.begin for row in rows])


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
        observer=row.observer,
        coded=row.coded,
        begin=row.begin,
        segments=row.segments,
        num_prompt=int(index < row.num_prompt),
        slots=None if row.slots is None else [slot + index for slot in row.slots],
    )
