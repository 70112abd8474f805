"""The order in which micro-batches pass through layers; models know nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.placement import Tier
from headrace.contracts.step import Pooling
from headrace.exec.batch import ForwardBatch
from headrace.exec.taps import Site, Tap
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.adapted_linear import AdapterRoutes
from headrace.ops.paged import AttentionSpec
from headrace.ops.reference import add_sinks
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
            self._batch.attention[self._arena.group_of(layer)],
        )
        if sinks is not None:
            out = add_sinks(out, lse, sinks)
        return out.flatten(1)

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


class LayerLoop:
    """Runs a model over micro-batches: all layers of one before the next begins.

    With ``tiers``, all micro-batches pass a layer before the next layer begins, so that what a
    layer needs is brought once: a block schedule.
    """

    def __init__(
        self,
        model: DecoderModel,
        arena: KVArena,
        ops: Ops,
        routes: AdapterRoutes,
        taps: Mapping[str, Tap[Any]],
        tiers: Sequence[Tier] = (),
    ) -> None:
        self._tiers = tiers
        self._routes = routes
        self._taps = taps
        self._model = model
        self._arena = arena
        self._ops = ops

    def run(self, batches: Sequence[ForwardBatch]) -> Tensor:
        """Hidden states of all inputs, ``[T, hidden]``, before the final norm."""
        if self._tiers:
            hidden = self._run_by_layer(batches)
        else:
            hidden = [self._run_layers(batch) for batch in batches]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _context(self, batch: ForwardBatch) -> LayerContext:
        if batch.tapped:
            return TappedContext(batch, self._arena, self._ops, self._taps)
        return LayerContext(batch, self._arena, self._ops)

    def _run_by_layer(self, batches: Sequence[ForwardBatch]) -> list[Tensor]:
        hidden = [self._model.embed(batch.input_ids, batch.positions) for batch in batches]
        contexts = [self._context(batch) for batch in batches]
        blocks = [
            [*places] for _, places in groupby(range(len(batches)), lambda i: batches[i].block)
        ]
        try:
            for tier in self._tiers:
                tier.begin(len(blocks))
            for index, layer in enumerate(self._model.layers):
                for block, places in enumerate(blocks):
                    for tier in self._tiers:
                        tier.enter(index, block)
                    for place in places:
                        self._routes.rows = batches[place].adapted
                        entering = contexts[place].enter(index, hidden[place])
                        hidden[place] = layer.feed(layer.mix(entering, contexts[place]))
                    for tier in self._tiers:
                        tier.leave(index, block)
            for tier in self._tiers:
                tier.end()
        except BaseException:
            for tier in self._tiers:
                tier.stop()
            raise
        return hidden

    def _run_layers(self, batch: ForwardBatch) -> Tensor:
        context = self._context(batch)
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
