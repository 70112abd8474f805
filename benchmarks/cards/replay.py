"""Decisions that a trained model took, taken again where weights are random and only time counts.

Random weights guess nothing right and are sure of nothing. All the work of a step is done as ever;
then what was decided by it is replaced by what a trained model had decided at that point.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from headrace.contracts.step import SampleState
from headrace.exec.decoding import speculation
from headrace.exec.decoding.verifier import Chain, judge
from headrace.exec.exits import early_exit
from headrace.exec.sampling.sampler import Sampler
from headrace.methods import find_method

Judged = list[tuple[list[int], Tensor]]


@dataclass(slots=True)
class Acceptances:
    """How many tokens of each chain stayed: level, and length of the chain -> counts in order."""

    counts: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))

    def note(self, level: int, guessed: int, accepted: int) -> None:
        """Of a chain of so many tokens, so many stayed."""
        self.counts[level, guessed].append(accepted)

    def share(self, level: int) -> float:
        """Of all tokens guessed at a level, those that stayed."""
        found = [(n * len(c), sum(c)) for (at, n), c in self.counts.items() if at == level]
        return sum(kept for _, kept in found) / max(1, sum(guessed for guessed, _ in found))

    def length(self, level: int) -> float:
        """Tokens of a step at a level, that which the model adds included."""
        found = [c for (at, n), c in self.counts.items() if at == level and n]
        return 1 + sum(map(sum, found)) / max(1, sum(map(len, found)))


@contextmanager
def _judged_by(name: str, judging: Callable[..., Judged]) -> Iterator[None]:
    """Let chains be judged so, by the engine and by the method of that name."""
    method = sys.modules[find_method(name).__module__]
    with ExitStack() as patched:
        for module in (speculation, method):
            if hasattr(module, "judge"):
                patched.enter_context(patch.object(module, "judge", judging))
        yield


@contextmanager
def acceptances_of(name: str) -> Iterator[Acceptances]:
    """What is accepted of the guesses of a method, from here on."""
    found = Acceptances()

    def noting(
        sampler: Sampler,
        chains: Sequence[Chain],
        logits: Tensor,
        states: Sequence[SampleState],
        level: int,
    ) -> Judged:
        judged = judge(sampler, chains, logits, states, level)
        for chain, (tokens, _) in zip(chains, judged, strict=True):
            found.note(level, len(chain.tokens), len(tokens) - 1)
        return judged

    with _judged_by(name, noting):
        yield found


@contextmanager
def accepting(name: str, recorded: Acceptances) -> Iterator[None]:
    """Let as much be accepted as was, of chains of the same length in the same order.

    Of a length that was never guessed, the share of the nearest one is taken.
    """
    counts = {key: cycle(found) for key, found in recorded.counts.items()}

    def accepted(level: int, guessed: int) -> int:
        if guessed == 0:
            return 0
        lengths = [n for at, n in counts if at == level and n]
        nearest = min(lengths, key=lambda n: abs(n - guessed))
        return min(guessed, round(next(counts[level, nearest]) * guessed / nearest))

    def replaying(
        sampler: Sampler,
        chains: Sequence[Chain],
        logits: Tensor,
        states: Sequence[SampleState],
        level: int,
    ) -> Judged:
        judged = judge(sampler, chains, logits, states, level)
        return [
            ([*chain.tokens[: accepted(level, len(chain.tokens))], tokens[-1]], weights)
            for chain, (tokens, weights) in zip(chains, judged, strict=True)
        ]

    with _judged_by(name, replaying):
        yield


@dataclass(slots=True)
class Leaving:
    """At every exit that was asked: how sure its head was, whether it left, and its token."""

    sure: list[float] = field(default_factory=list)
    left: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@contextmanager
def leaving() -> Iterator[Leaving]:
    """What rows decide at exits, from here on."""
    found, answer = Leaving(), early_exit.ExitHeads.answer

    def noting(self: Any, layer: int, hidden: Tensor, methods: Any, head: Any) -> Any:
        leaves, logits = answer(self, layer, hidden, methods, head)
        confidence = early_exit.CONFIDENCE[methods[0].confidence]
        found.sure += confidence(logits.float().softmax(-1)).tolist()
        found.left += leaves.tolist()
        found.tokens += logits.argmax(-1).tolist()
        return leaves, logits

    with patch.object(early_exit.ExitHeads, "answer", noting):
        yield found


@contextmanager
def leaving_as(recorded: Leaving) -> Iterator[None]:
    """Let rows leave as they did, in order."""
    decisions, answer = cycle(recorded.left), early_exit.ExitHeads.answer

    def replaying(self: Any, layer: int, hidden: Tensor, methods: Any, head: Any) -> Any:
        leaves, logits = answer(self, layer, hidden, methods, head)
        return torch.tensor([next(decisions) for _ in leaves]), logits

    with patch.object(early_exit.ExitHeads, "answer", replaying):
        yield
