"""The order in which micro-batches pass through layers; models know nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.step import Pooling
from headrace.exec.batch import ForwardBatch
from headrace.exec.page_view import PageView
from headrace.exec.taps import Site, Tap
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.adapted_linear import AdapterRoutes
from headrace.ops.paged import AttentionSpec, StepShape
from headrace.ops.reference import add_sinks, rotate
from headrace.ops.table import Ops


class LayerContext:
    """The ``AttentionContext`` of one micro-batch."""

    def __init__(self, batch: ForwardBatch, arena: KVArena, ops: Ops) -> None:
        self.rows = batch.rows
        self._batch = batch
        self._arena = arena
        self._ops = ops
        self._angles: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See ``AttentionContext``."""
        cos, sin = self.angles(rotary)
        out, lse = self._ops.attention.attend(
            q,
            k,
            v,
            cos,
            sin,
            self._arena.cache(layer),
            spec,
            self._plan(layer, q, cos, sin),
        )
        if sinks is not None:
            out = add_sinks(out, lse, sinks)
        return out.flatten(1)

    def _plan(self, layer: int, q: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """What attention made of the step's rows for a layer with these queries, not rotated."""
        return self._batch.attention[self._arena.group_of(layer)]

    def angles(self, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """See ``AttentionContext``."""
        if rotary not in self._angles:
            self._angles[rotary] = rotary.cos_sin(self._batch.positions, self._ops.dtype)
        return self._angles[rotary]

    def states(self, layer: int) -> dict[str, Tensor]:
        """See ``AttentionContext``."""
        return self._arena.states(layer)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """What layer ``layer`` gets of the residual stream ``[T, hidden]``."""
        return hidden


class TappedContext(LayerContext):
    """The context of a micro-batch with rows whose methods have taps."""

    def __init__(
        self, batch: ForwardBatch, arena: KVArena, ops: Ops, taps: Mapping[str, Tap[Any]]
    ) -> None:
        super().__init__(batch, arena, ops)
        self._taps = [
            (tap, batch.tapped[name]) for name, tap in taps.items() if name in batch.tapped
        ]

    def _tap(self, site: Site, layer: int, values: Tensor) -> Tensor:
        for tap, rows in self._taps:
            if tap.site == site:
                values = tap(layer, values, rows)
        return values

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See ``AttentionContext``."""
        q = self._tap("query", layer, q)
        k = self._tap("key", layer, k)
        v = self._tap("value", layer, v)
        out = super().attend(layer, q, k, v, rotary, spec, sinks)
        return self._tap("attention", layer, out.unflatten(1, (q.shape[1], -1))).flatten(1)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        return self._tap("hidden", layer, hidden)


class ViewContext(TappedContext):
    """The context of a micro-batch whose layers read what a view says."""

    def __init__(
        self,
        batch: ForwardBatch,
        arena: KVArena,
        ops: Ops,
        taps: Mapping[str, Tap[Any]],
        view: PageView,
    ) -> None:
        super().__init__(batch, arena, ops, taps)
        self._view = view

    def _plan(self, layer: int, q: Tensor, cos: Tensor, sin: Tensor) -> Any:
        rows, keys = self.rows, self._arena.cache(layer).keys
        tables = self._view.tables(layer, rows, lambda: rotate(q, cos, sin))
        lengths = np.array(rows.lengths)
        shape = StepShape.of_one_group(lengths, self._batch.past, tables, keys.heads)
        return self._ops.attention.plan(shape, keys)


class LayerLoop:
    """Runs a model over micro-batches: all layers of one before the next begins."""

    def __init__(
        self,
        model: DecoderModel,
        arena: KVArena,
        ops: Ops,
        routes: AdapterRoutes,
        taps: Mapping[str, Tap[Any]],
    ) -> None:
        self._routes = routes
        self._taps = taps
        self._model = model
        self._arena = arena
        self._ops = ops

    def run(self, batches: Sequence[ForwardBatch], view: PageView | None = None) -> Tensor:
        """Hidden states of all inputs, ``[T, hidden]``, before the final norm."""
        hidden = [self._run_layers(batch, view) for batch in batches]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _run_layers(self, batch: ForwardBatch, view: PageView | None) -> Tensor:
        context: LayerContext
        if view is not None:
            context = ViewContext(batch, self._arena, self._ops, self._taps, view)
        elif batch.tapped:
            context = TappedContext(batch, self._arena, self._ops, self._taps)
        else:
            context = LayerContext(batch, self._arena, self._ops)
        self._routes.rows = batch.adapted
        hidden = self._model.embed(batch.input_ids, batch.positions)
        for index, layer in enumerate(self._model.layers):
            hidden = layer.mix(context.enter(index, hidden), context)
            hidden = layer.feed(hidden)
        return hidden

    def pool(self, hidden: Tensor, pooling: Pooling) -> Tensor:
        """``[T, hidden]`` of a row -> ``[hidden]``: of the last or first input, or the sum."""
        if pooling == "mean":
            return self._model.norm(hidden).float().sum(0)
        return self._model.norm(hidden[-1:] if pooling == "last" else hidden[:1])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` -> ``[R, vocab]``; row by row where ops are batch-invariant."""
        if not self._ops.batch_invariant:
            return self._model.head(hidden)
        return torch.cat([self._model.head(row) for row in hidden.split(1)])
