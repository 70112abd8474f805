"""The verifier against its theory, on vocabularies that can be counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.exec.decoding import verifier
from headrace.exec.decoding.verifier import DRAW, Chain, numbers, verify
from headrace.exec.sampling import wide
from headrace.exec.sampling.sampler import Sampler
from tests.exec.chi_square import chi_square
from tests.exec.plain_sampling import END, make_state, probabilities

VOCAB = 4
LENGTH = 2
DRAWS = 1000

PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.8},
    {"top_k": 2},
    {"min_p": 0.2, "temperature": 1.7},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"logit_bias": {1: 2.0, 2: -3.0}},
    {"min_tokens": 2},
    {"temperature": 0.0, "min_tokens": 2, "repetition_penalty": 3.0},
]

Logits = Callable[[tuple[int, ...]], Tensor]
"""Of what follows some tokens, ``[VOCAB]``."""


def random_logits(seed: int) -> Logits:
    """Another row for every text."""

    def logits(tokens: tuple[int, ...]) -> Tensor:
        place = sum((token + 1) * (VOCAB + 1) ** i for i, token in enumerate(tokens))
        generator = torch.Generator().manual_seed(1000 * seed + place)
        return torch.randn(VOCAB, generator=generator)

    return logits


def expected_texts(logits: Logits, params: dict[str, Any]) -> dict[Any, float]:
    """The probability of each text of ``LENGTH`` tokens that is drawn token by token."""
    found = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        share = 1.0
        for count, token in enumerate(text):
            state = make_state(output=text[:count], **params)
            share *= probabilities(logits(text[:count]).double().numpy(), state)[token]
        found[text] = share
    return found


class Weights:
    """What follows each text, as requests with some parameters would draw it."""

    def __init__(self, logits: Logits, params: dict[str, Any]) -> None:
        self._logits, self._params = logits, params
        self._found: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, text: list[int]) -> Tensor:
        key = tuple(text)
        if key not in self._found:
            state = make_state(output=key, **self._params)
            self._found[key] = Sampler().distributions(self._logits(key)[None], [state])[0][0]
        return self._found[key]


class Sequence:
    """A sequence that grows by guesses and their verification."""

    def __init__(self, target: Weights, draft: Weights, seed: int, params: dict[str, Any]) -> None:
        self.target, self.draft = target, draft
        self.state = make_state(seed, **params)
        self.drafted = self.accepted = 0

    def guess(self, length: int) -> Chain:
        tokens: list[int] = []
        weights = []
        for _ in range(length):
            weights.append(self.draft([*self.state.output_token_ids, *tokens]))
            number = numbers([self.state.after(tokens)], 1, DRAW, torch.device("cpu"))
            tokens.append(int(wide.locate(weights[-1][None], number)))
        return Chain(tokens, weights)

    def step(self, length: int) -> None:
        chain = self.guess(length)
        texts = [[*self.state.output_token_ids, *chain.tokens[:i]] for i in range(length + 1)]
        rows = list(map(self.target, texts))
        new = verify(chain, torch.stack(rows), [True] * len(rows), self.state)
        self.drafted += length
        self.accepted += len(new) - 1
        self.state.output_token_ids.extend(new)

    def text(self, lengths: list[int]) -> tuple[int, ...]:
        while len(self.state.output_token_ids) < LENGTH:
            self.step(lengths[len(self.state.output_token_ids) % len(lengths)])
        return tuple(self.state.output_token_ids[:LENGTH])


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_distributions_are_what_is_drawn_from(params: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs: list[tuple[int, ...]] = [(), (1, 2, 2), (END, 1)]
    states = [make_state(output=output, **params) for output in outputs]
    logits = torch.randn(len(states), 300, generator=generator) * 2
    expected = [
        probabilities(row.double().numpy(), state)
        for row, state in zip(logits, states, strict=True)
    ]
    weights, usable = Sampler().distributions(logits, states)
    assert usable == [True] * len(states)
    assert np.abs(weights[:, :300].numpy() - np.stack(expected)).max() < 1e-6
    assert not weights[:, 300:].any()


def test_rows_that_are_not_finite_are_told() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = float("nan")
    weights, usable = Sampler().distributions(logits, [make_state()] * 3)
    assert usable == [True, False, True]
    assert not weights[1].any()


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_texts_are_distributed_as_without_guesses(params: dict[str, Any]) -> None:
    """Also when a place is guessed again, and when guesses run out at other places."""
    target, draft = (Weights(random_logits(seed), params) for seed in (1, 2))
    sequences = [Sequence(target, draft, seed, params) for seed in range(DRAWS)]
    texts = [each.text([2, 1]) for each in sequences]
    expected = expected_texts(random_logits(1), params)
    if params.get("temperature") == 0.0:
        assert {expected[text] for text in texts} == {1.0}
        return
    assert chi_square(texts, expected) < 5
    share = sum(each.accepted for each in sequences) / sum(each.drafted for each in sequences)
    assert 0.1 < share < 0.9, "nothing is tried"


@pytest.mark.parametrize("fault", ["residual", "level"])
def test_a_wrong_verifier_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistic above sees what it should see."""
    if fault == "residual":
        monkeypatch.setattr(verifier, "RESIDUAL", verifier.ACCEPT)
    else:
        kept = verifier.numbers
        monkeypatch.setattr(verifier, "numbers", lambda s, level, use, d: kept(s, 1, DRAW, d))
    target, draft = (Weights(random_logits(seed), {}) for seed in (1, 2))
    texts = [Sequence(target, draft, seed, {}).text([2]) for seed in range(DRAWS)]
    assert chi_square(texts, expected_texts(random_logits(1), {})) > 10


def test_guesses_stay_as_often_as_the_distributions_overlap() -> None:
    """Fast Inference from Transformers via Speculative Decoding, theorem 3.5."""
    target, draft = (Weights(random_logits(seed), {}) for seed in (3, 4))
    accepted = 0
    for seed in range(DRAWS):
        sequence = Sequence(target, draft, seed, {})
        sequence.step(1)
        accepted += sequence.accepted
    overlap = float(torch.minimum(target([]), draft([])).sum())
    assert abs(accepted / DRAWS - overlap) < 5 * (overlap * (1 - overlap) / DRAWS) ** 0.5


def test_a_perfect_draft_always_stays() -> None:
    params = {"temperature": 1.3, "top_p": 0.9}
    weights = Weights(random_logits(5), params)
    for seed in range(100):
        sequence = Sequence(weights, weights, seed, params)
        sequence.step(LENGTH)
        assert sequence.accepted == LENGTH


def test_the_end_of_what_is_finite_is_the_end() -> None:
    state = make_state(temperature=0.0)
    one = torch.eye(64)
    chain = Chain([5, 6], [one[5], one[6]])
    target = one[[5, 6, 7]]
    assert verify(chain, target, [True, True, True], state) == [5, 6, 7]
    assert verify(chain, target, [True, True, False], state) == [5, 6]
    assert verify(chain, target, [True, False, True], state) == [5]
    assert verify(chain, target, [False, True, True], state) == []
    assert verify(chain, one[[5, 8, 7]], [True, True, False], state) == [5, 8]
