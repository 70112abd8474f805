"""FlexGen: weights and KV pages on disk, where a cost model says that they cost least."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from headrace.contracts.method import MethodCard
from headrace.contracts.placement import Placement, PlacementFacts, PlacementMethod, parse_bytes


@dataclass(frozen=True, slots=True)
class FlexGen(PlacementMethod):
    """Run a model that is larger than ``memory``, with batches that are, too.

    Args:
        memory: cap of weights, KV pages, buffers and what a step computes with, in bytes or as in
            512MiB; the interpreter and its libraries come on top.
        directory: for what goes to disk; it should not be on one in memory.
        micro_batch: sequences that go through a layer together; 0: the cost model chooses.
        overlap: read the next layer while one computes; off, to see what that saves.
        direct: read and write past the page cache.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="FlexGen: High-Throughput Generative Inference of Large Language Models with a "
        "Single GPU",
        summary="Keeps weights and KV pages beyond a memory cap on disk, read ahead of their use.",
        guarantee="exact",
        request_options=None,
    )

    memory: str = ""
    directory: str = ""
    micro_batch: int = 0
    overlap: bool = True
    direct: bool = True

    def __post_init__(self) -> None:
        try:
            parse_bytes(self.memory)
        except ValueError as error:
            raise ValueError(f"memory: {error}") from None
        if not self.directory:
            raise ValueError("name a directory for what goes to disk: directory=DIRECTORY")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch must be at least 0, got {self.micro_batch}")

    def place(self, facts: PlacementFacts) -> Placement:
        """The placement that takes a step the least time (section 4.3).

        The linear programme of the paper has two unknowns here, the shares of weights and of KV
        that are in memory, for each size of a micro-batch. Both are whole layers, so all that are
        on the edge of the cap are tried.
        """
        cap = parse_bytes(self.memory)
        found = list(self._candidates(facts, cap))
        fitting = [placement for placement in found if facts.memory(placement) <= cap]
        if not fitting:
            least = min(map(facts.memory, found))
            raise ValueError(
                f"memory: at least {least} bytes are needed for embeddings, output head, norms, "
                f"what a step computes with and buffers for a layer, got {self.memory}; raise it, "
                "or lower max_model_len, max_num_seqs or max_num_batched_tokens"
            )
        return min(fitting, key=lambda each: (self.seconds(facts, each), -each.block_rows))

    def _candidates(self, facts: PlacementFacts, cap: int) -> Iterator[Placement]:
        """For each micro-batch and share of KV on disk, the fewest weights there that fit."""
        plain = Placement(block_rows=self.micro_batch or facts.sequences)
        if facts.memory(plain) <= cap:
            yield plain
            return
        cached = [layer for group in facts.layout.groups for layer in group.layers]
        weighty = [layer for layer, size in enumerate(facts.layer_bytes) if size]
        for rows in self._micro_batches(facts):
            pages = min(facts.num_pages, rows * facts.sequence_pages)
            for count in range(len(cached) + 1):

                def place(
                    streamed: int, count: int = count, rows: int = rows, pages: int = pages
                ) -> Placement:
                    return Placement(
                        streamed=spread(weighty, streamed),
                        spilled=spread(cached, count),
                        block_rows=rows,
                        block_pages=pages,
                        slots=2 if self.overlap else 1,
                    )

                yield place(0)
                # From the first on, each layer on disk frees memory.
                counts = range(1, len(weighty) + 1)
                fewest = bisect_left(counts, True, key=lambda n: facts.memory(place(n)) <= cap)
                yield place(min(fewest + 1, len(weighty)))

    def _micro_batches(self, facts: PlacementFacts) -> list[int]:
        if self.micro_batch:
            return [self.micro_batch]
        doubled = [1 << bits for bits in range(facts.sequences.bit_length())]
        return sorted({*doubled, facts.sequences})

    def seconds(self, facts: PlacementFacts, placement: Placement) -> float:
        """Of a step in which every sequence, half as long as it may be, gets a token.

        Reading the disk and computing, which reads memory, take turns or go on at once.
        """
        pages = [facts.layout.layer_bytes(layer) for layer in range(len(facts.layer_bytes))]
        held = min(facts.sequences * facts.sequence_pages / 2, facts.num_pages)
        blocks = math.ceil(facts.sequences / placement.block_rows)
        computing = blocks * sum(facts.layer_bytes) + held * sum(pages)
        weights = sum(facts.layer_bytes[layer] for layer in placement.streamed)
        spilled = sum(pages[layer] for layer in placement.spilled)
        # What is read, and the last page of every sequence, which is written back.
        reading = weights + spilled * (held + facts.sequences)
        parts = (computing / facts.memory_bandwidth, reading / facts.disk_bandwidth)
        return max(parts) if self.overlap else sum(parts)


def spread(layers: list[int], count: int) -> frozenset[int]:
    """So many of the layers, evenly apart, so that reading never pauses for long."""
    return frozenset(layers[place * len(layers) // count] for place in range(count))
