"""From a step plan to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.step import PageTables, PlanRow
from headrace.kv.arena import KVArena
from headrace.ops.paged import StepShape
from headrace.ops.table import Ops


@dataclass(slots=True)
class ForwardBatch:
    """Inputs that go through the layers together.

    Args:
        input_ids, positions: ``[T]``.
        attention: one plan per cache group.
    """

    input_ids: Tensor
    positions: Tensor
    attention: list[Any]


class BatchBuilder:
    """Builds the micro-batches of a step: one, or one per token where ops are batch-invariant."""

    def __init__(self, arena: KVArena, ops: Ops) -> None:
        self._arena = arena
        self._ops = ops
        self._groups = range(len(arena.layout.groups))

    def build(self, rows: Sequence[PlanRow], tables: PageTables) -> list[ForwardBatch]:
        """The micro-batches, in the order in which they must run."""
        if not self._ops.batch_invariant:
            return [self._batch(rows, tables)]
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
        return ForwardBatch(self._tensor(ids), self._tensor(positions), plans)

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
    )
