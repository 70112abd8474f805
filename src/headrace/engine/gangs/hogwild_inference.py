"""Hogwild! Inference: workers that write side by side, each seeing what the others have so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headrace.contracts.gang import GangMethod
from headrace.contracts.method import MethodCard

NUMBER = "{number}"
"""In a header: of the worker, from 1 on."""


@dataclass(frozen=True, slots=True)
class HogwildInference(GangMethod):
    """The ``n`` completions of a request are workers that see each other's tokens at once.

    Each sees the prompt, then the others' blocks, in turn from the next worker on, and its own
    block last, as if all were one text (section "Cache Layouts", the contiguous layout). Keys are
    rotated once, and queries for each block ("Concurrent Attention with Shared Key-Value Cache").

    Args:
        header: text before what a worker writes, by which workers can be told apart; ``{number}``
            in it is the worker's. Without one, workers that do not sample all write the same.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="Hogwild! Inference: Parallel LLM Generation via Concurrent Attention",
        summary="The completions of a request are workers that see each other's tokens at once.",
        guarantee="lossy",
        request_options=("header",),
    )

    header: str = f"\n\n## Worker {NUMBER}\n\n"

    def seen_blocks(self, viewer: int, count: int) -> Sequence[int]:
        return [(viewer + step) % count for step in range(1, count)]

    def headers(self, count: int) -> Sequence[str]:
        return [self.header.replace(NUMBER, str(worker)) for worker in range(1, count + 1)]
