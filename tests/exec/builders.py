"""A runner over a tiny random model, and the steps that drive it without an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from headrace.contracts.cache import CacheGroup, CacheLayout, layout_of
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import PageTables, PlanRow, RowResult, SampleState, StepPlan
from headrace.exec.forward import Forward
from headrace.exec.runner import LocalRunner
from headrace.exec.sampling.sampler import Drawn, Sampler
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel, find_architecture
from headrace.ops.device import resolve_device
from headrace.ops.table import Ops, make_ops
from headrace.weights.loader import WeightLoader
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint

BLOCK = 4
PAGES = 160
NAN_BYTE = 255
"""Halves and floats of such bytes are NaN."""


class RecordingSampler(Sampler):
    """Keeps the logits of the last step, one row per token drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> list[Drawn]:
        self.logits += logits.clone()
        return super().sample(logits, states)


@dataclass
class Bench:
    """A runner with its arena and page tables; pages are dealt by hand."""

    model: DecoderModel
    arena: KVArena
    ops: Ops
    tables: PageTables
    sampler: RecordingSampler = field(default_factory=RecordingSampler)

    def __post_init__(self) -> None:
        self.runner = LocalRunner(Forward(self.model, self.arena, self.ops), self.sampler)
        self._deck = np.random.default_rng(1).permutation(PAGES).tolist()

    def deal(self, row: int, slots: int) -> list[int]:
        """Give a table row pages for ``slots`` slots in every group, blanked; returns group 0's."""
        count = self.arena.layout.pages_for(slots)
        for table in self.tables:
            table[row, :count] = [self._deck.pop() for _ in range(count)]
            self.arena.blank_pages(table[row, :count].tolist())
        return self.tables[0, row, :count].tolist()

    def step(self, *rows: PlanRow, **plan: Any) -> tuple[list[RowResult], list[Tensor]]:
        """Execute one step; results per row, and the logits that were sampled from."""
        self.sampler.logits = []
        ticket = self.runner.submit(StepPlan(list(rows), **plan), self.tables)
        return self.runner.collect(ticket).rows, self.sampler.logits


def load_model(
    directory: Path, dtype: str, device: str, reference: bool
) -> tuple[DecoderModel, Ops]:
    """The model of a checkpoint and the operations it runs on."""
    ops = make_ops(resolve_device(device), dtype, batch_invariant=reference)
    checkpoint = SafetensorsCheckpoint(directory)
    architecture = find_architecture(checkpoint.config)
    return architecture(
        checkpoint.config, WeightLoader(checkpoint, architecture.load_map, ops), ops
    ), ops


def make_bench(
    directory: Path,
    *,
    reference: bool = False,
    grouped: bool = False,
    dtype: str = "float32",
    cache: str | None = None,
    device: str = "cpu",
) -> Bench:
    """A bench; ``grouped`` gives each layer a cache group and page table of its own.

    ``cache`` is the element type of the KV cache, by default that of computation.
    """
    model, ops = load_model(directory, dtype, device, reference)
    config = json.loads((directory / "config.json").read_text())
    layout = layout_of(type(model).layer_states(config, cache or dtype), BLOCK)
    if grouped:
        (group,) = layout.groups
        groups = [
            CacheGroup((layer,), (planes,))
            for layer, planes in zip(group.layers, group.planes, strict=True)
        ]
        layout = CacheLayout(BLOCK, tuple(groups))
    arena = KVArena(layout, PAGES, device)
    arena.pages.fill_(NAN_BYTE)
    tables = np.zeros((len(layout.groups), 8, 64), dtype=np.int32)
    return Bench(model, arena, ops, tables)


def sampling(seed: int = 0, **params: Any) -> SampleState:
    """One draw; greedy unless told."""
    return SampleState(SamplingParams(**{"temperature": 0.0, **params}), [0], [], seed)


def plan_row(table_row: int, ids: Sequence[int], slot: int = 0, **options: Any) -> PlanRow:
    """Inputs at the positions of their slots; one greedy sample unless told."""
    options.setdefault("positions", range(slot, slot + len(ids)))
    options.setdefault("samples", [sampling()])
    return PlanRow(
        sequence=table_row, table_row=table_row, input_ids=list(ids), slot=slot, **options
    )
