"""What policies of slots note of attention, and the reduction of slots that they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts.slot_policy import SlotPolicy
from headrace.contracts.step import Compaction, PageTables, PlanRow
from headrace.kv.arena import KVArena
from headrace.ops.paged import AttentionSpec
from headrace.ops.probe import attention_weights


@dataclass(frozen=True, slots=True)
class ObservedRow:
    """A row of a micro-batch whose attention is noted.

    Args:
        start, queries: its inputs in the micro-batch.
        past: slots before them.
        first_slot: where its slots are among those of all rows.
        pages: of each cache group, int64: those of its slots.
    """

    policy: SlotPolicy
    table_row: int
    start: int
    queries: int
    past: int
    first_slot: int
    pages: Sequence[Tensor]

    @property
    def sums_suffice(self) -> bool:
        """Whether the attention that each slot gets tells the policy all."""
        return self.queries == 1 or self.policy.adds_up


class SlotStatistics:
    """For each sequence, layer and KV head, a number for each slot; zero where nothing is noted.

    Args:
        slots: that a sequence with a policy has at most.
    """

    def __init__(self, arena: KVArena, num_rows: int, slots: int) -> None:
        self._arena = arena
        device = arena.pages.device
        self._layers = {
            layer: torch.zeros(num_rows, arena.cache(layer).keys.heads, slots, device=device)
            for group in arena.layout.groups
            for layer in group.layers
        }

    def note(
        self, layer: int, q: Tensor, lse: Tensor, spec: AttentionSpec, row: ObservedRow
    ) -> None:
        """Let a row's policy take note of what it attended to in a layer.

        Args:
            q: ``[T, heads, width]`` of its inputs, rotated; lse: ``[T, heads]``.
        """
        keys = self._arena.cache(layer).keys
        pages = row.pages[self._arena.group_of(layer)]
        known = self._layers[layer][row.table_row, :, : row.past + row.queries]
        for first, weights in attention_weights(q, lse, keys, pages, row.past, spec):
            row.policy.observe(known, weights.mean(dim=1), row.past + first)

    def note_sums(self, layer: int, sums: Tensor, ratio: int, row: ObservedRow) -> None:
        """The same where ``row.sums_suffice``.

        Args:
            sums: fp32 ``[kv_heads, S]``: what the slots of all rows got, see ``Attention.attend``.
            ratio: heads that share a KV head.
        """
        slots = row.past + row.queries
        mean = sums[:, row.first_slot : row.first_slot + slots] / ratio
        known = self._layers[layer][row.table_row, :, :slots]
        row.policy.observe(known, mean.unsqueeze(1), row.past)

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what is known of table rows."""
        for layer in self._layers.values():
            layer[rows] = 0.0

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy what is known of table rows, (source, target) each, one after another."""
        for source, target in pairs:
            for layer in self._layers.values():
                layer[target] = layer[source]

    def compact(self, row: PlanRow, compaction: Compaction, tables: PageTables) -> None:
        """Reduce a row's slots in every layer and head to those that its policy ranks highest."""
        count = row.slot + len(row.input_ids)
        columns = self._arena.layout.pages_for(count)
        for index, group in enumerate(self._arena.layout.groups):
            source, target = (
                torch.from_numpy(pages.astype("int64")).to(self._arena.pages.device)
                for pages in (tables[index, row.table_row, :columns], compaction.pages[index])
            )
            for layer in group.layers:
                known = self._layers[layer][row.table_row]
                ranks = compaction.policy.rank(known[:, :count])
                kept = ranks.topk(compaction.slots, dim=1).indices.sort(dim=1).values
                self._arena.move_slots(layer, source, kept, target)
                left = compaction.policy.carry(known[:, :count].gather(1, kept))
                known.zero_()
                known[:, : compaction.slots] = left
