"""Speculative decoding with a small model that guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headrace.contracts.method import MethodCard
from headrace.contracts.step import PageTables, PlanRow
from headrace.exec.decoding.drafter import (
    Drafter,
    DrafterMethod,
    DraftParts,
    Guess,
    guess_one_by_one,
)
from headrace.exec.decoding.second_model import SecondModel
from headrace.exec.decoding.verifier import Chain


@dataclass(frozen=True, slots=True)
class DraftModel(DrafterMethod):
    """Let a small model draw some tokens ahead.

    Args:
        model: its directory, GGUF file or hub id; its tokens must be the engine's model's.
        length: tokens that it draws in one step, at most.
        window: tokens that it sees, the first ones and the last; 0: as many as it can.
        adaptive: stop where it makes a sequence no faster.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="Fast Inference from Transformers via Speculative Decoding",
        summary="Lets a small model draw tokens ahead, which the model checks all at once.",
        guarantee="distribution",
        request_options=("length", "adaptive"),
    )

    model: str = ""
    length: int = 4
    window: int = 1024
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("name the small model: model=PATH")
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")

    @property
    def most_drafted(self) -> int:
        return self.length

    @property
    def always_on(self) -> bool:
        return not self.adaptive

    def open(self, parts: DraftParts) -> SmallModel:
        return SmallModel(SecondModel(parts.load(self.model), parts, self.window, sinks=4), parts)


class SmallModel(Drafter):
    """A small model in memory."""

    def __init__(self, model: SecondModel, parts: DraftParts) -> None:
        self._model = model
        self._sampler = parts.sampler

    def propose(self, rows: Sequence[PlanRow], tables: PageTables) -> list[Chain]:
        guesses = [Guess(row, row.samples[0], row.draft_room) for row in rows]
        guess_one_by_one(guesses, self._model.next_logits, self._sampler, level=1)
        return [guess.chain() for guess in guesses]

    def observe(self, rows: Sequence[PlanRow], accepted: Sequence[int]) -> None:
        for row, count in zip(rows, accepted, strict=True):
            self._model.forget(row, row.positions.stop + count)
