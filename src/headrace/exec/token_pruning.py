"""Prompts of which later layers have fewer tokens: the route of what goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from headrace.contracts.method import of_kind
from headrace.contracts.step import PageTables, PlanRow
from headrace.contracts.token_pruning import TokenPruningMethod
from headrace.exec.route import Route
from headrace.kv.arena import KVArena
from headrace.ops.paged import AttentionSpec
from headrace.ops.probe import attention_weights
from headrace.ops.recurrent import RowSpans
from headrace.ops.reference import rotate


def pruning_route(
    rows: Sequence[PlanRow], arena: KVArena, tables: PageTables, layers: int
) -> Route | None:
    """How the rows of a step go; ``None`` if none of them loses a token."""
    if not any(row.num_prompt and row.slots is not None for row in rows):
        return None
    ways = []
    for row in rows:
        method = next(iter(of_kind(row.methods, TokenPruningMethod)), None)
        if method is not None and row.num_prompt:
            begins = method.begins(layers)
            if method.left(len(begins), len(row.input_ids)) < len(row.input_ids):
                ways.append(_Way(row, method, begins))
                continue
        ways.append(_Way(row, None, ()))
    if all(way.method is None for way in ways):
        return None
    return PruningRoute(ways, arena, tables)


@dataclass(slots=True)
class _Way:
    """A row on its way through the layers.

    Args:
        row: as it is fed to the layers now.
        method: as the row chose it, if it loses tokens.
        begins: of the stages.

    Attributes:
        count: its inputs, before any was lost.
        first: whether its sequence begins with it.
        kept: which of its inputs are left, if some are not.
        queries, lse: of the last of them in the layer watched last: rotated, of one input or more.
    """

    row: PlanRow
    method: TokenPruningMethod | None
    begins: tuple[int, ...]
    count: int = field(init=False)
    first: bool = field(init=False)
    kept: Tensor | None = None
    queries: list[Tensor] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = len(self.row.input_ids)
        self.first = self.row.positions[0] == 0

    @property
    def passing(self) -> int:
        """Inputs of the layers that it is fed to."""
        return len(self.row.input_ids)

    def lose(self, chosen: Tensor, count: int) -> None:
        """Go on with ``count`` of the inputs that are left, int64 ``[count]``, ascending."""
        row, places = self.row, chosen.tolist()
        ascending = all(one < other for one, other in pairwise([-1, *places]))
        if len(places) != count or not ascending or places[-1] != self.passing - 1:
            assert self.method is not None
            raise ValueError(
                f"{self.method.name()} must choose {count} of {self.passing} tokens, ascending and "
                f"with the last among them; it chose {places}"
            )
        loud = len(row.input_ids) - row.num_quiet
        self.kept = chosen if self.kept is None else self.kept[chosen]
        self.row = replace(
            row,
            input_ids=[row.input_ids[place] for place in places],
            positions=[row.positions[place] for place in places],
            num_quiet=len(places) - loud,
            num_prompt=len(places),
        )


class PruningRoute(Route):
    """Parts of prompts lose tokens at the beginnings of stages.

    Invariant: behind such a layer, the slots of its group take the tokens that are left, one after
    another.
    """

    def __init__(self, ways: list[_Way], arena: KVArena, tables: PageTables) -> None:
        self._ways, self._arena, self._tables = ways, arena, tables
        self._by_table_row = {way.row.table_row: way for way in ways if way.method}
        self.exits = tuple(sorted({layer for way in ways for layer in way.begins}))
        self.watched = frozenset(layer - 1 for layer in self.exits)
        self.logits = {}
        self._specs: dict[int, AttentionSpec] = {}

    @property
    def rows(self) -> list[PlanRow]:
        return [way.row for way in self._ways]

    def watch(
        self,
        layer: int,
        rows: RowSpans,
        q: Tensor,
        lse: Tensor,
        angles: tuple[Tensor, Tensor],
        spec: AttentionSpec,
    ) -> None:
        self._specs[layer] = spec
        end = 0
        for length, table_row in zip(rows.lengths, rows.table_rows, strict=True):
            end += length
            way = self._by_table_row.get(table_row)
            if way is None or way.method is None or layer + 1 not in way.begins:
                continue
            last = slice(end - min(length, way.method.window), end)
            turned = rotate(q[last], *(part[last] for part in angles))
            # A row may come in several micro-batches, an input each.
            way.queries = [*way.queries, turned][-way.method.window :]
            way.lse = [*way.lse, lse[last]][-way.method.window :]

    def part(self, layer: int, hidden: Tensor) -> Tensor | None:
        pieces, changed = [], False
        spans = hidden.split([way.passing for way in self._ways])
        for way, span in zip(self._ways, spans, strict=True):
            chosen = self._choose(layer, way)
            if chosen is not None:
                span, changed = span[chosen], True
            pieces.append(span)
        return torch.cat(pieces) if changed else None

    def _choose(self, layer: int, way: _Way) -> Tensor | None:
        """Which inputs of a row go on, and do so; ``None``: all."""
        if way.method is None or layer not in way.begins:
            return None
        queries = torch.cat(way.queries)[-way.method.window :]
        lse = torch.cat(way.lse)[-way.method.window :]
        way.queries, way.lse = [], []
        count = way.method.left(way.begins.index(layer) + 1, way.count)
        if count == way.passing:
            return None
        weights = self._weights(layer - 1, way.row, queries, lse)
        chosen = way.method.choose(weights, count, way.first)
        way.lose(chosen, count)
        return chosen

    def _weights(self, layer: int, row: PlanRow, queries: Tensor, lse: Tensor) -> Tensor:
        """What the last inputs of a row attended to among its inputs in a layer."""
        group, cache = self._arena.group_of(layer), self._arena.cache(layer)
        past, layout = row.slot_in(group), self._arena.layout
        end, first = past + len(row.input_ids), past // layout.block_size
        table = self._tables[group, row.table_row, first : layout.pages_for(end)]
        pages = torch.from_numpy(table.astype("int64")).to(queries.device)
        skipped, spec = first * layout.block_size, self._specs[layer]
        before = end - len(queries) - skipped
        found = attention_weights(queries, lse, cache.keys, pages, before, spec)
        return torch.cat([weights[..., past - skipped :] for _, weights in found], dim=2)

    def join(self, hidden: Tensor) -> Tensor:
        """Hidden states of all inputs of the step; zeros for those that were lost."""
        found, start = [], 0
        for way in self._ways:
            span = hidden[start : start + way.passing]
            start += way.passing
            if way.kept is not None:
                span = hidden.new_zeros(way.count, hidden.shape[1]).index_copy(0, way.kept, span)
            found.append(span)
        return torch.cat(found)
