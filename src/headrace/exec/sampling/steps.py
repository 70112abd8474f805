"""The steps of sampling: each changes the scores of the rows that ask for it.

Scores are ``[R, vocab]`` in fp32. Order: penalties, bias and bans act on logits; temperature
scales them; top-k, min-p and top-p cut; the draw inverts the cumulative distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.step import SampleState

_FIRST_CANDIDATES = 256
_BISECTIONS = 40


@dataclass(slots=True)
class SamplingBatch:
    """Parameters of all rows: the states, and what every step reads as ``[R, 1]`` columns."""

    states: Sequence[SampleState]
    device: torch.device
    temperature: Tensor
    top_k: list[int]
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def build(cls, states: Sequence[SampleState], device: torch.device) -> SamplingBatch:
        """Gather the rows' parameters."""
        params = [state.params for state in states]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device).unsqueeze(1)

        return cls(
            states,
            device,
            column([float(p.temperature) for p in params]),
            [p.top_k for p in params],
            column([float(p.top_p) for p in params]),
            column([float(p.min_p) for p in params]),
        )

    def any(self, test: Callable[[SampleState], bool]) -> bool:
        """Whether some row passes the test."""
        return any(test(state) for state in self.states)

    def draw(self, scores: Tensor) -> Tensor:
        """``[R]``: the first token at which the cumulative probability exceeds the row's number.

        Greedy rows take the highest score.
        """
        highest = scores.argmax(dim=-1)
        if not self.any(lambda s: not s.params.greedy):
            return highest
        cumulative = torch.softmax(scores, dim=-1).cumsum(dim=-1)
        numbers = torch.from_numpy(uniform_numbers(self.states)).to(self.device).unsqueeze(1)
        # Scaling by the last value keeps rounding of the sum from pointing past the end.
        targets = numbers * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
        tokens = tokens.clamp_(max=scores.shape[1] - 1)
        return torch.where(self.temperature.squeeze(1) == 0, highest, tokens)


def uniform_numbers(states: Sequence[SampleState]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """One number in [0, 1) per row: a hash of its seed and of how many tokens it has.

    SplitMix64 (Fast Splittable Pseudorandom Number Generators, section 5).
    """
    with np.errstate(over="ignore"):
        seeds = np.array([s.seed & (2**64 - 1) for s in states], dtype=np.uint64)
        draws = np.array([len(s.output_token_ids) + 1 for s in states], dtype=np.uint64)
        mixed = _mix(_mix(seeds) + draws * np.uint64(0x9E3779B97F4A7C15))
    return ((mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24)).astype(np.float32)


def _mix(z: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class SamplingStep(ABC):
    """One link of the chain."""

    @abstractmethod
    def applies(self, batch: SamplingBatch) -> bool:
        """Whether some row asks for it."""

    @abstractmethod
    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        """New scores; rows that do not ask for the step keep theirs."""


def default_steps() -> list[SamplingStep]:
    """The usual chain, in order."""
    return [Penalties(), LogitBias(), Bans(), Temperature(), TopK(), MinP(), TopP()]


class Penalties(SamplingStep):
    """Repetition (CTRL, section 4.1), presence and frequency penalties of tokens seen."""

    def applies(self, batch: SamplingBatch) -> bool:
        return batch.any(self._asked)

    @staticmethod
    def _asked(state: SampleState) -> bool:
        params = state.params
        return bool(
            params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        )

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        for row, state in enumerate(batch.states):
            if not self._asked(state):
                continue
            params, counts = state.params, Counter(state.output_token_ids)
            if params.repetition_penalty != 1.0:
                seen = list({*state.prompt_token_ids, *counts})
                old = scores[row, seen]
                factor = params.repetition_penalty
                scores[row, seen] = torch.where(old > 0, old / factor, old * factor)
            if counts and (params.presence_penalty or params.frequency_penalty):
                amounts = torch.tensor(list(counts.values()), device=batch.device)
                scores[row, list(counts)] -= (
                    params.frequency_penalty * amounts + params.presence_penalty
                )
        return scores


class LogitBias(SamplingStep):
    """Addends per token."""

    def applies(self, batch: SamplingBatch) -> bool:
        return batch.any(lambda state: bool(state.params.logit_bias))

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        for row, state in enumerate(batch.states):
            if bias := state.params.logit_bias:
                values = torch.tensor(list(bias.values()), device=batch.device)
                scores[row, list(bias)] += values.to(scores.dtype)
        return scores


class Bans(SamplingStep):
    """Tokens that may not be drawn now."""

    def applies(self, batch: SamplingBatch) -> bool:
        return batch.any(lambda state: bool(state.banned_token_ids))

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        for row, state in enumerate(batch.states):
            if state.banned_token_ids:
                scores[row, list(state.banned_token_ids)] = -math.inf
        return scores


class Temperature(SamplingStep):
    """Division by the temperature; greedy rows keep their scores."""

    def applies(self, batch: SamplingBatch) -> bool:
        return batch.any(lambda state: state.params.temperature not in (0.0, 1.0))

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        divisor = torch.where(batch.temperature == 0, 1.0, batch.temperature)
        return (scores - scores.amax(dim=-1, keepdim=True)).div_(divisor)


class TopK(SamplingStep):
    """Keeps the k highest scores, and ties of the last."""

    def applies(self, batch: SamplingBatch) -> bool:
        return any(batch.top_k)

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        vocab = scores.shape[1]
        wanted = [min(k, vocab) for k in batch.top_k]
        best = scores.topk(max(wanted), dim=-1).values
        last = torch.tensor([max(k - 1, 0) for k in wanted], device=batch.device).unsqueeze(1)
        threshold = best.gather(1, last)
        off = torch.tensor([k == 0 for k in wanted], device=batch.device).unsqueeze(1)
        return scores.masked_fill((scores < threshold) & ~off, -math.inf)


class MinP(SamplingStep):
    """Keeps tokens at least ``min_p`` times as likely as the likeliest (Min-p Sampling)."""

    def applies(self, batch: SamplingBatch) -> bool:
        return batch.any(lambda state: state.params.min_p > 0)

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        # log(0) is -inf, which keeps everything in rows that do not ask.
        threshold = scores.amax(dim=-1, keepdim=True) + torch.log(batch.min_p)
        return scores.masked_fill(scores < threshold, -math.inf)


class TopP(SamplingStep):
    """Keeps the smallest set of likeliest tokens with probability ``top_p``, and ties of its last.

    The Curious Case of Neural Text Degeneration, section 3.1. The vocabulary is never sorted:
    the set is looked for among the likeliest few, and where it is larger, the probability of its
    last token is found by bisection.
    """

    def applies(self, batch: SamplingBatch) -> bool:
        return batch.any(self._asked)

    @staticmethod
    def _asked(state: SampleState) -> bool:
        return state.params.top_p < 1.0 and not state.params.greedy

    def __call__(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        rows = [row for row, state in enumerate(batch.states) if self._asked(state)]
        wanted = batch.top_p[rows]
        probabilities = torch.softmax(scores[rows], dim=-1)
        best = probabilities.topk(min(_FIRST_CANDIDATES, scores.shape[1]), dim=-1).values
        cumulative = best.cumsum(dim=-1)
        place = (cumulative < wanted).sum(dim=-1, keepdim=True)
        threshold = best.gather(1, place.clamp(max=best.shape[1] - 1))
        beyond = (place == best.shape[1]).squeeze(1)
        if bool(beyond.any()):
            threshold[beyond] = _bisect(probabilities[beyond], wanted[beyond])
        scores[rows] = scores[rows].masked_fill(probabilities < threshold, -math.inf)
        return scores


def _bisect(probabilities: Tensor, wanted: Tensor) -> Tensor:
    """The largest threshold ``[R, 1]`` whose upper set has at least the ``wanted`` probability."""
    low = torch.zeros_like(wanted)
    high = probabilities.amax(dim=-1, keepdim=True)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        mass = torch.where(probabilities >= middle, probabilities, 0).sum(dim=-1, keepdim=True)
        enough = mass >= wanted
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low
