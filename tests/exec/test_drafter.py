"""Guessing one by one: as requests draw, as far as there is room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.step import PlanRow
from headrace.exec.decoding.drafter import Guess, guess_one_by_one
from headrace.exec.sampling.sampler import Sampler
from tests.exec.plain_sampling import make_state

VOCAB = 8


def guess_for(table_row: int, room: int, **params: Any) -> Guess:
    state = make_state(seed=table_row, prompt=(1, 2), output=(3,), **params)
    return Guess(PlanRow(table_row, table_row, [3], range(2, 3), 2), state, room)


def test_chains_are_drawn_as_requests_draw() -> None:
    """Each token counts for the penalties of the next; every chain ends at its room."""
    asked: list[list[int]] = []

    def next_logits(guesses: Sequence[Guess]) -> Tensor:
        asked.append([guess.row.table_row for guess in guesses])
        return torch.arange(VOCAB).float().repeat(len(guesses), 1)

    greedy = guess_for(0, 3, temperature=0.0, presence_penalty=1.5)
    short, none = guess_for(1, 1, temperature=0.0), guess_for(2, 0)
    sampled = guess_for(3, 2, top_k=2)
    guess_one_by_one([greedy, short, none, sampled], next_logits, Sampler(), level=1)
    assert asked == [[0, 1, 3], [0, 3], [0]]
    assert (greedy.tokens, short.tokens, none.tokens) == ([7, 6, 7], [7], [])
    assert len(sampled.tokens) == 2 and set(sampled.tokens) <= {6, 7}
    share = 1 / (1 + math.exp(-1))
    for row in sampled.weights:
        assert torch.allclose(row[6:8], torch.tensor([1 - share, share]))
        assert not row[:6].any() and not row[8:].any()


def test_levels_draw_apart() -> None:
    texts = []
    for level in (1, 2):
        guess = guess_for(0, 20)
        guess_one_by_one([guess], lambda g: torch.zeros(len(g), VOCAB), Sampler(), level)
        texts.append(guess.tokens)
    assert texts[0] != texts[1]


def test_chains_end_where_logits_are_not_finite() -> None:
    def next_logits(guesses: Sequence[Guess]) -> Tensor:
        logits = torch.zeros(len(guesses), VOCAB)
        for row, guess in zip(logits, guesses, strict=True):
            row[4] = math.nan if len(guess.tokens) == guess.row.table_row else 9.0
        return logits

    guesses = [guess_for(place, 3, temperature=0.0) for place in range(5)]
    guess_one_by_one(guesses, next_logits, Sampler(), level=1)
    assert [guess.tokens for guess in guesses] == [[], [4], [4, 4], [4] * 3, [4] * 3]


def test_places_of_a_guess_under_another() -> None:
    guess = guess_for(0, 5)
    guess.tokens = [4, 6]
    below = guess.below(most=4)
    assert (below.start, below.room, below.known) == (5, 2, [1, 2, 3, 4, 6])
    below.tokens = [7, 0]
    row = below.as_row(slot=100)
    assert (row.input_ids, row.positions, row.slot) == ([6, 7, 0], range(4, 7), 102)
