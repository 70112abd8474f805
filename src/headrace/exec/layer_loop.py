"""The order in which micro-batches pass through layers; models know nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.step import PlanRow, Pooling
from headrace.exec.batch import ForwardBatch
from headrace.exec.extensions import Extensions
from headrace.exec.page_view import PageView
from headrace.exec.route import Route
from headrace.exec.taps import Site
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.paged import AttentionSpec, LayerCache, StepShape
from headrace.ops.reference import add_sinks, rotate
from headrace.ops.table import Ops


class LayerContext:
    """The ``AttentionContext`` of one micro-batch.

    What methods do in it costs nothing where no row has such a method.

    Args:
        view: what the layers read in place of the page tables; ``None``: these.
        route: of the step's rows, if some do not go through all layers as they are.
    """

    def __init__(
        self,
        batch: ForwardBatch,
        arena: KVArena,
        ops: Ops,
        extensions: Extensions,
        view: PageView | None = None,
        route: Route | None = None,
    ) -> None:
        self.rows = batch.rows
        self._route = route
        self._batch = batch
        self._arena = arena
        self._ops = ops
        self._view = view
        self._statistics = extensions.statistics
        self._angles: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}
        self._segment_angles: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}
        taps = extensions.taps
        self._taps = [(taps[name], rows) for name, rows in batch.tapped.items()]

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
        if self._taps:
            q = self._tap("query", layer, q)
            k = self._tap("key", layer, k)
            v = self._tap("value", layer, v)
        cos, sin = self.angles(rotary)
        attention, cache = self._ops.attention, self._arena.cache(layer)
        planned = self._plan(layer, q, cos, sin)
        sums = self._score_sums(cache, q.device)
        out, lse = attention.attend(q, k, v, cos, sin, cache, spec, planned, sums)
        if self._batch.segments is not None:
            out, lse = self._see_segments(layer, q, (out, lse), rotary, spec)
        if self._batch.coded:
            self._see_units(layer, q, (out, lse), (cos, sin), spec)
        if self._batch.observed:
            self._observe(layer, q, lse, (cos, sin), spec, sums)
        if self._route is not None and layer in self._route.watched:
            self._route.watch(layer, self.rows, q, lse, (cos, sin), spec)
        if sinks is not None:
            out = add_sinks(out, lse, sinks)
        if self._taps:
            out = self._tap("attention", layer, out)
        return out.flatten(1)

    def _plan(self, layer: int, q: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """What attention made of the step's rows for a layer with these queries, not rotated."""
        if self._view is None:
            return self._batch.attention[self._arena.group_of(layer)]
        keys = self._arena.cache(layer).keys
        tables = self._view.tables(layer, self.rows, lambda: rotate(q, cos, sin))
        lengths = np.array(self.rows.lengths)
        shape = StepShape.of_one_group(lengths, self._batch.past, tables, keys.heads)
        return self._ops.attention.plan(shape, keys)

    def _score_sums(self, cache: LayerCache, device: torch.device) -> Tensor | None:
        """Room for what slots get of attention, if that is what policies of rows are told."""
        batch = self._batch
        if not batch.summed or self._view is not None:
            return None
        if not self._ops.attention.sums_scores(cache):
            return None
        slots = int(batch.past.sum()) + sum(batch.rows.lengths)
        return torch.empty(cache.keys.heads, slots, device=device)

    def _see_segments(
        self,
        layer: int,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        rotary: RotaryEmbedding,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor]:
        """Attention to what rows read beside their own context, merged with that."""
        segments = self._batch.segments
        assert segments is not None
        if rotary not in self._segment_angles:
            found = rotary.cos_sin(segments.positions, self._ops.dtype)
            self._segment_angles[rotary] = found
        angles, cache = self._segment_angles[rotary], self._arena.cache(layer)
        group = self._arena.group_of(layer)
        return segments.merge(q, own, angles, self._ops.attention, cache, spec, group)

    def _see_units(
        self,
        layer: int,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        spec: AttentionSpec,
    ) -> None:
        """Merge attention to the coded units of rows into that to their own slots."""
        for rows in self._batch.coded[self._arena.group_of(layer)]:
            pages = self._arena.pages
            self._ops.coded_attention.attend(pages, layer, rows, q, angles, own, spec)

    def _observe(
        self,
        layer: int,
        q: Tensor,
        lse: Tensor,
        angles: tuple[Tensor, Tensor],
        spec: AttentionSpec,
        sums: Tensor | None,
    ) -> None:
        """Let policies take note of the attention of their rows."""
        assert self._statistics is not None
        for row in self._batch.observed:
            if sums is not None:
                self._statistics.note_sums(layer, sums, q.shape[1] // len(sums), row)
                continue
            inputs = slice(row.start, row.start + row.queries)
            turned = rotate(q[inputs], *(part[inputs] for part in angles))
            self._statistics.note(layer, turned, lse[inputs], spec, row)

    def _tap(self, site: Site, layer: int, values: Tensor) -> Tensor:
        for tap, rows in self._taps:
            if tap.site == site:
                values = tap(layer, values, rows)
        return values

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
        return self._tap("hidden", layer, hidden) if self._taps else hidden

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """What goes on from the last layer of the residual stream ``[T, hidden]``."""
        return self._tap("final", layer, hidden)


class LayerLoop:
    """Runs a model over micro-batches: all layers of one before the next begins.

    With ``tiers``, all micro-batches pass a layer before the next layer begins, so that what a
    layer needs is brought once: a block schedule.
    """

    def __init__(
        self, model: DecoderModel, arena: KVArena, ops: Ops, extensions: Extensions | None = None
    ) -> None:
        self._extensions = extensions or Extensions()
        self._tiers = self._extensions.placed.tiers
        self._model = model
        self._arena = arena
        self._ops = ops

    def run(self, batches: Sequence[ForwardBatch], view: PageView | None = None) -> Tensor:
        """Hidden states of all inputs, ``[T, hidden]``, before the final norm."""
        if self._tiers:
            hidden = self._run_by_layer(batches, view)
        else:
            hidden = [self._run_layers(batch, view) for batch in batches]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def run_routed(
        self,
        batches: Sequence[ForwardBatch],
        route: Route,
        build: Callable[[Sequence[PlanRow], int], Sequence[ForwardBatch]],
    ) -> Tensor:
        """The same where rows may leave: all micro-batches reach an exit before any goes on.

        Args:
            build: micro-batches of the rows that go on, for layers from one on.
        """
        hidden = torch.cat([self._embed(batch) for batch in batches])
        first = 0
        for layer in route.exits:
            hidden = self._run_between(batches, hidden, first, layer, route)
            first = layer
            parted = route.part(layer, hidden)
            if parted is not None:
                hidden, batches = parted, build(route.rows, layer) if route.rows else ()
        return route.join(self._run_between(batches, hidden, first, self.num_layers, route))

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._model.layers)

    def _run_between(
        self, batches: Sequence[ForwardBatch], hidden: Tensor, first: int, end: int, route: Route
    ) -> Tensor:
        """Layers ``first`` up to ``end`` on the residual stream of all micro-batches."""
        parts = hidden.split([len(batch.input_ids) for batch in batches]) if batches else ()
        passed = []
        for batch, part in zip(batches, parts, strict=True):
            self._route(batch)
            passed.append(self._pass(part, self._context(batch, None, route), first, end))
        return torch.cat(passed) if passed else hidden

    def _context(
        self, batch: ForwardBatch, view: PageView | None, route: Route | None = None
    ) -> LayerContext:
        return LayerContext(batch, self._arena, self._ops, self._extensions, view, route)

    def _route(self, batch: ForwardBatch) -> None:
        """Say which inputs go through which adapters and neurons, before they run."""
        self._extensions.routes.rows = batch.adapted
        if self._extensions.neurons is not None:
            self._extensions.neurons.routes.step = batch.neurons

    def _run_by_layer(self, batches: Sequence[ForwardBatch], view: PageView | None) -> list[Tensor]:
        hidden = [self._embed(batch) for batch in batches]
        contexts = [self._context(batch, view) for batch in batches]
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
                        self._route(batches[place])
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
        last = len(self._model.layers) - 1
        return [context.leave(last, part) for context, part in zip(contexts, hidden, strict=True)]

    def _run_layers(self, batch: ForwardBatch, view: PageView | None) -> Tensor:
        context = self._context(batch, view)
        self._route(batch)
        return self._pass(self._embed(batch), context, 0, len(self._model.layers))

    def _embed(self, batch: ForwardBatch) -> Tensor:
        return self._model.embed(batch.input_ids, batch.positions)

    def _pass(self, hidden: Tensor, context: LayerContext, first: int, end: int) -> Tensor:
        layers = self._model.layers
        for index in range(first, end):
            hidden = layers[index].mix(context.enter(index, hidden), context)
            hidden = layers[index].feed(hidden)
        return hidden if end < len(layers) else context.leave(end - 1, hidden)

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
