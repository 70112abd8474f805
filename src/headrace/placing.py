"""A model and its KV cache in memory and on disk, as a method places them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout
from headrace.contracts.method import Method, of_kind
from headrace.contracts.placement import Placement, PlacementFacts, PlacementMethod
from headrace.disk import DiskFile, measure_reading
from headrace.errors import ConfigurationError
from headrace.exec.extensions import Placed
from headrace.kv.arena import KVArena
from headrace.kv.tiered_arena import TieredArena, file_bytes
from headrace.models.base import DecoderModel
from headrace.ops.table import Ops
from headrace.plan.hardware import read_bandwidth
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.formats import WeightPlan
from headrace.weights.loader import plan_weights
from headrace.weights.reader import WeightReader
from headrace.weights.streaming import LayerCounter, StreamingLinears, WeightTier

_log = logging.getLogger(__name__)

_MEASURED = 64 << 20
"""Bytes that are read to measure the bandwidth of memory."""


class Placing:
    """What the layers of one engine have on disk; nothing, unless a method wants it so.

    Attributes:
        placement: what is where.
        num_pages: of the KV cache, if a method decides where they are.
        ops: those of the engine, whose ``linears`` also make weights ready that stay on disk.
    """

    def __init__(self, methods: Sequence[Method], ops: Ops) -> None:
        self.placement = Placement()
        self.num_pages: int | None = None
        self.ops = ops
        self._method = next(iter(of_kind(methods, PlacementMethod)), None)
        self._pages: DiskFile | None = None
        self._weights: WeightTier | None = None
        self._arena: TieredArena | None = None

    def decide(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        architecture: type[DecoderModel],
        plan: WeightPlan,
        layout: CacheLayout,
        chunk: int,
    ) -> None:
        """Let the method decide, and be ready to take weights.

        Args:
            chunk: inputs of a step at most.

        Raises:
            ConfigurationError: there is not enough memory or disk, the disk cannot be used, or
                the device or its operations cannot read weights from it.
        """
        method = self._method
        if method is None:
            return
        with _explained(method):
            if self.ops.device != "cpu":
                raise ValueError("computes on the CPU alone; set device=cpu")
            facts = self._facts(method, config, checkpoint, architecture, plan, layout, chunk)
            self.num_pages = facts.num_pages
            self.placement = placement = method.place(facts)
            _log.info(
                "on disk: weights of %d and KV pages of %d of %d layers; %d sequences in a block",
                len(placement.streamed),
                len(placement.spilled),
                len(facts.layer_bytes),
                placement.block_rows,
            )
            if placement.spilled:
                self._pages = _page_file(method, layout, facts.num_pages, placement)
            if not placement.streamed:
                return
            size = sum(facts.layer_bytes[layer] for layer in placement.streamed)
            tier = WeightTier(
                placement.streamed,
                lambda: _scratch(method, size),
                direct=method.direct,
                slots=placement.slots,
                ahead=method.overlap,
            )
            linears = StreamingLinears(self.ops.linears, self.ops.dtype, tier)
        self._weights = tier
        self.ops = replace(self.ops, linears=linears)

    def _facts(
        self,
        method: PlacementMethod,
        config: EngineConfig,
        checkpoint: Checkpoint,
        architecture: type[DecoderModel],
        plan: WeightPlan,
        layout: CacheLayout,
        chunk: int,
    ) -> PlacementFacts:
        shape = architecture.shape(checkpoint.config)
        context = config.max_model_len or shape.context
        num_pages = layout.pages_to_hold(context, chunk) * config.max_num_seqs
        if config.kv_cache_memory_bytes is not None and layout.groups:
            num_pages = config.kv_cache_memory_bytes // layout.page_bytes
        reader = WeightReader(checkpoint, architecture.load_map)
        counter = LayerCounter(
            reader, plan_weights(checkpoint, plan), self.ops.linears, self.ops.dtype
        )
        model = architecture(checkpoint.config, counter, self.ops)
        sizes = tuple(counter.layer_bytes.get(layer, 0) for layer in range(len(model.layers)))
        # The widest activations before a product, as its kernel wants them and behind it; and
        # logits with their probabilities.
        activations = 3 * chunk * counter.largest * self.ops.dtype.itemsize
        logits = 2 * config.max_num_seqs * shape.vocab_size * torch.float32.itemsize
        states = layout.state_bytes * config.max_num_seqs
        return PlacementFacts(
            fixed_bytes=counter.num_bytes - sum(sizes) + states + activations + logits,
            layer_bytes=sizes,
            layout=layout,
            num_pages=num_pages,
            sequences=config.max_num_seqs,
            sequence_pages=layout.pages_for(context),
            disk_bandwidth=measure_reading(Path(method.directory), method.direct),
            memory_bandwidth=read_bandwidth(self.ops.threads, _MEASURED, seconds=0.05),
        )

    def weights_are_loaded(self) -> None:
        """Begin to read those that are on disk. Raises ConfigurationError."""
        if self._weights is not None and self._method is not None:
            with _explained(self._method):
                self._weights.open()

    def make_arena(
        self, layout: CacheLayout, num_pages: int, device: str, num_rows: int
    ) -> KVArena:
        """The KV cache."""
        placement, method = self.placement, self._method
        if method is None or self._pages is None:
            return KVArena(layout, num_pages, device, num_rows)
        self._arena = TieredArena(
            layout,
            num_pages,
            num_rows,
            spilled=placement.spilled,
            block_pages=min(num_pages, placement.block_pages),
            slots=placement.slots,
            file=self._pages,
            ahead=method.overlap,
        )
        return self._arena

    @property
    def placed(self) -> Placed:
        """What the runner has to know."""
        tiers = tuple(tier for tier in (self._weights, self._arena) if tier is not None)
        return Placed(self.placement, tiers)

    def close(self) -> None:
        """Give back files, memory and threads, of an engine that was never put together."""
        for tier in self.placed.tiers:
            tier.close()
        if self._pages is not None:
            self._pages.close()


def _scratch(method: PlacementMethod, size: int) -> DiskFile:
    with _explained(method):
        return DiskFile.scratch(Path(method.directory), size)


def _page_file(
    method: PlacementMethod, layout: CacheLayout, num_pages: int, placement: Placement
) -> DiskFile:
    """A file with room for the pages of all spilled layers. Raises ValueError."""
    size = file_bytes(layout, num_pages, placement.spilled)
    try:
        file = DiskFile.scratch(Path(method.directory), size)
        file.reserve(size)
    except ValueError as error:
        raise ValueError(
            f"{error}; KV pages take it: lower max_model_len, max_num_seqs or "
            "kv_cache_memory_bytes to need less"
        ) from error
    if method.direct:
        file.bypass_cache()
    return file


@contextmanager
def _explained(method: Method) -> Iterator[None]:
    """A context that turns ValueError and OSError into errors that name the method."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"method: {method.name()}: {error}") from error
