"""TriForce: a small model guesses for the model on few of its pages, and that for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.method import MethodCard, ModelFacts
from headrace.contracts.step import PageTables, PlanRow
from headrace.exec.decoding.drafter import (
    Drafter,
    DrafterMethod,
    DraftParts,
    Guess,
    guess_one_by_one,
)
from headrace.exec.decoding.second_model import SecondModel
from headrace.exec.decoding.verifier import Chain, judge
from headrace.exec.page_view import ChosenPages
from headrace.ops.paged import PagedPlane


@dataclass(frozen=True, slots=True)
class TriForce(DrafterMethod):
    """Speculate in two levels, for long contexts.

    Args:
        model: the small model's directory, GGUF file or hub id; with the tokens of the engine's.
        length: tokens that the model on few pages is sure of before all pages are read.
        small_length: tokens that the small model guesses before few pages are read.
        window: tokens that the small model sees: the first ones and the last.
        budget: tokens of the pages that are chosen.
        refresh: generated tokens after which they are chosen again.
        adaptive: stop where it makes a sequence no faster.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical "
        "Speculative Decoding",
        summary="Guesses with the model on chosen pages, for which a small model guesses.",
        guarantee="distribution",
        request_options=("length", "adaptive"),
    )

    model: str = ""
    length: int = 6
    small_length: int = 2
    window: int = 256
    budget: int = 4096
    refresh: int = 128
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("name the small model: model=PATH")
        for name in ("length", "small_length", "window", "budget", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self, model: ModelFacts) -> None:
        DrafterMethod.check(self, model)
        if any(layer.window is not None for layer in model.layers):
            raise ValueError("needs layers that read all of the past; some here have a window")

    @property
    def most_drafted(self) -> int:
        return self.length

    @property
    def always_on(self) -> bool:
        return not self.adaptive

    def open(self, parts: DraftParts) -> Hierarchy:
        small = SecondModel(parts.load(self.model), parts, self.window, sinks=16)
        view = RetrievedPages(parts.target.arena, self.budget, self.refresh)
        return Hierarchy(small, view, parts, self.small_length)


class Hierarchy(Drafter):
    """The two levels below the model (section 4.2, algorithm 1)."""

    def __init__(
        self, small: SecondModel, view: RetrievedPages, parts: DraftParts, small_length: int
    ) -> None:
        self._small, self._view, self._parts = small, view, parts
        self._small_length = small_length

    def propose(self, rows: Sequence[PlanRow], tables: PageTables) -> list[Chain]:
        self._view.begin(rows, tables)
        guesses = [Guess(row, row.samples[0], row.draft_room) for row in rows]
        target, sampler, most = self._parts.target, self._parts.sampler, self._small_length
        while growing := [guess for guess in guesses if len(guess.tokens) < guess.room]:
            small = [guess.below(most) for guess in growing]
            guess_one_by_one(small, self._small.next_logits, sampler, level=2)
            fed = [below.as_row(self._view.slot(below.row)) for below in small]
            logits = target.logits(target.hidden(fed, tables, self._view))
            chains, states = [below.chain() for below in small], [below.state for below in small]
            judged = judge(sampler, chains, logits, states, level=1)
            for guess, below, (tokens, weights) in zip(growing, small, judged, strict=True):
                guess.grow(tokens, weights)
                self._small.forget(guess.row, below.start + max(0, len(tokens) - 1))
        return [guess.chain() for guess in guesses]

    def observe(self, rows: Sequence[PlanRow], accepted: Sequence[int]) -> None:
        for row, count in zip(rows, accepted, strict=True):
            self._small.forget(row, row.positions.stop + count)


class RetrievedPages(ChosenPages):
    """The pages whose mean keys the query likes best (section 4.1).

    A page holds the keys of all heads of a layer: each query head spreads one vote over the pages.
    """

    def choose(self, keys: PagedPlane, pages: Tensor, query: Tensor, count: int) -> Tensor:
        query = query.float().view(keys.heads, -1, keys.width)
        votes = torch.zeros(len(pages), device=query.device)
        for head in range(keys.heads):
            means = keys.read(head, pages).view(len(pages), keys.block_size, -1).mean(1)
            votes += torch.softmax(query[head] @ means.T * keys.width**-0.5, -1).sum(0)
        return votes.topk(count).indices
