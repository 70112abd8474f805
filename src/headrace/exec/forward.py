"""A model that runs on any rows, over any view of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.cache import LayerState
from headrace.contracts.step import PageTables, PlanRow
from headrace.exec.batch import BatchBuilder
from headrace.exec.extensions import Extensions
from headrace.exec.layer_loop import LayerLoop
from headrace.exec.page_view import PageView
from headrace.exec.route import Route
from headrace.exec.taps import SITES, ShapeTap, Site, SiteShapes, Tap
from headrace.exec.token_pruning import pruning_route
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
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
    """A model with its cache, its operations, and what adds to them."""

    def __init__(
        self,
        model: DecoderModel,
        arena: KVArena,
        ops: Ops,
        extensions: Extensions | None = None,
    ) -> None:
        self.arena = arena
        self.ops = ops
        self.extensions = extensions or Extensions()
        self.builder = BatchBuilder(arena, ops, model.causal, self.extensions)
        self.loop = LayerLoop(model, arena, ops, self.extensions)

    def hidden(
        self, rows: Sequence[PlanRow], tables: PageTables, view: PageView | None = None
    ) -> Tensor:
        """Hidden states of all inputs, ``[T, hidden]``, row after row.

        Args:
            tables: page tables of every cache group; each row is written from its ``slot`` on.
            view: what the layers read in their place. Slots are then those of the view.
        """
        return self.loop.run(self.builder.build(rows, tables), view)

    def route(self, rows: Sequence[PlanRow], tables: PageTables) -> Route | None:
        """How the rows of a step go through the layers; ``None``: each through all."""
        depth = self.extensions.depth
        if depth is not None:
            return depth.route(rows, self.arena, self.loop.logits)
        if self.arena.layout.num_stages == 1:
            return None
        return pruning_route(rows, self.arena, tables, self.loop.num_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` -> ``[R, vocab]``."""
        return self.loop.logits(hidden)

    def last_logits(self, hidden: Tensor, rows: Sequence[PlanRow]) -> Tensor:
        """``[R, vocab]`` after the last input of each row."""
        ends = torch.tensor([len(row.input_ids) for row in rows], device=hidden.device)
        return self.logits(hidden[ends.cumsum(0) - 1])

    def trace_shapes(self) -> SiteShapes:
        """What passes each site, found by feeding a token into pages that nobody holds yet."""
        shapes: dict[tuple[Site, int], tuple[int, ...]] = {}
        taps: dict[str, Tap[Any]] = {site: ShapeTap(site, shapes) for site in SITES}
        row = PlanRow(sequence=0, table_row=0, input_ids=[0], positions=range(1), slot=0)
        tables = np.zeros((len(self.arena.layout.groups), 1, 1), dtype=np.int32)
        before, self.extensions.taps = self.extensions.taps, taps
        with torch.inference_mode():
            [batch] = self.builder.build([row], tables)
            batch.tapped = dict.fromkeys(SITES, ())
            self.loop.run([batch])
        self.extensions.taps = before
        return shapes
