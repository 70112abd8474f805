"""A model that runs on any rows, over any view of its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.cache import LayerState
from headrace.contracts.step import PageTables, PlanRow
from headrace.exec.batch import BatchBuilder
from headrace.exec.layer_loop import LayerLoop
from headrace.exec.page_view import PageView
from headrace.exec.taps import Tap
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.ops.adapted_linear import AdapterRoutes
from headrace.ops.table import Ops


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose weights are in memory.

    Args:
        states: what each layer keeps of a sequence.
        context: positions that it knows.
        block_size: slots of a page of its cache.
    """

    model: DecoderModel
    ops: Ops
    states: tuple[LayerState, ...]
    context: int
    block_size: int


class Forward:
    """A model with its cache and its operations. It has no state beside the arena."""

    def __init__(
        self,
        model: DecoderModel,
        arena: KVArena,
        ops: Ops,
        routes: AdapterRoutes | None = None,
        taps: Mapping[str, Tap[Any]] | None = None,
    ) -> None:
        self.arena = arena
        self.ops = ops
        self.routes = routes or AdapterRoutes()
        self._builder = BatchBuilder(arena, ops, model.causal, (taps or {}).keys())
        self._loop = LayerLoop(model, arena, ops, self.routes, taps or {})

    def hidden(
        self, rows: Sequence[PlanRow], tables: PageTables, view: PageView | None = None
    ) -> Tensor:
        """Hidden states of all inputs, ``[T, hidden]``, row after row.

        Args:
            tables: page tables of every cache group; each row is written from its ``slot`` on.
            view: what the layers read in their place. Slots are then those of the view.
        """
        return self._loop.run(self._builder.build(rows, tables), view)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` -> ``[R, vocab]``."""
        return self._loop.logits(hidden)

    def last_logits(self, hidden: Tensor, rows: Sequence[PlanRow]) -> Tensor:
        """``[R, vocab]`` after the last input of each row."""
        ends = torch.tensor([len(row.input_ids) for row in rows], device=hidden.device)
        return self.logits(hidden[ends.cumsum(0) - 1])
