"""The steps of sampling: each changes the rows that ask for it, and only those.

Penalties, bias and bans change the scores. Greedy rows then take the highest; the others are
divided by their temperature and cut by top-k, min-p and top-p before the draw.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import SampleState
from headrace.exec.sampling import wide
from headrace.ops.selection import Selection

_CANDIDATES = 128
_ROWS_AT_ONCE = 4
"""Rows whose whole vocabulary is looked through together: few, for the sake of caches."""


def column(
    states: Sequence[SampleState], value: Callable[[SamplingParams], float], device: torch.device
) -> Tensor:
    """One parameter of all rows, ``[R, 1]`` in fp32."""
    values = [float(value(state.params)) for state in states]
    return torch.tensor(values, device=device).unsqueeze(1)


def uniform_numbers(states: Sequence[SampleState], stream: int = 0) -> npt.NDArray[np.float32]:
    """One number in [0, 1) per row: a hash of its seed, of how many tokens it has, and of what it
    is for, which ``stream`` numbers.

    SplitMix64 (Fast Splittable Pseudorandom Number Generators, section 5).
    """
    seeds = np.array([s.seed & (2**64 - 1) for s in states], dtype=np.uint64)
    draws = np.array([len(s.output_token_ids) + 1 for s in states], dtype=np.uint64)
    streams = np.uint64(stream * 0xD1B54A32D192ED03 & 2**64 - 1)
    mixed = _mix(_mix(seeds) + draws * np.uint64(0x9E3779B97F4A7C15) + streams)
    return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class ScoreStep(ABC):
    """Changes the scores of some tokens of a row, each by a value of its own."""

    @abstractmethod
    def asked(self, state: SampleState) -> bool:
        """Whether the row asks for it."""

    @abstractmethod
    def entries(self, state: SampleState) -> Iterable[tuple[int, float]]:
        """(token id, value) of every token to change."""

    def change(self, scores: Tensor, values: Tensor) -> Tensor:
        """New scores of the tokens; both ``[n]`` in fp32."""
        return scores + values

    def __call__(self, scores: Tensor, states: Sequence[SampleState]) -> None:
        """Change ``scores`` ``[R, width]`` in place."""
        found = [
            (row, token, value)
            for row, state in enumerate(states)
            if self.asked(state)
            for token, value in self.entries(state)
        ]
        if found:
            rows, tokens, values = zip(*found, strict=True)
            index = torch.tensor((rows, tokens), device=scores.device).unbind()
            amounts = torch.tensor(values, dtype=torch.float32, device=scores.device)
            scores[index] = self.change(scores[index], amounts)


class RepetitionPenalty(ScoreStep):
    """Divides positive scores of tokens seen, multiplies negative ones (CTRL, section 4.1)."""

    def asked(self, state: SampleState) -> bool:
        return state.params.repetition_penalty != 1.0

    def entries(self, state: SampleState) -> Iterable[tuple[int, float]]:
        factor = state.params.repetition_penalty
        return ((t, factor) for t in {*state.prompt_token_ids, *state.output_token_ids})

    def change(self, scores: Tensor, values: Tensor) -> Tensor:
        return torch.where(scores > 0, scores / values, scores * values)


class CountPenalties(ScoreStep):
    """Presence and frequency penalties: subtracted once, and per occurrence, of output tokens."""

    def asked(self, state: SampleState) -> bool:
        return bool(state.params.presence_penalty or state.params.frequency_penalty)

    def entries(self, state: SampleState) -> Iterable[tuple[int, float]]:
        params, counts = state.params, Counter(state.output_token_ids)
        return (
            (token, -params.presence_penalty - params.frequency_penalty * count)
            for token, count in counts.items()
        )


class LogitBias(ScoreStep):
    """Addends per token."""

    def asked(self, state: SampleState) -> bool:
        return bool(state.params.logit_bias)

    def entries(self, state: SampleState) -> Iterable[tuple[int, float]]:
        return (state.params.logit_bias or {}).items()


class Bans(ScoreStep):
    """Tokens that may not be drawn now."""

    def asked(self, state: SampleState) -> bool:
        return bool(state.banned_token_ids)

    def entries(self, state: SampleState) -> Iterable[tuple[int, float]]:
        return ((token, -math.inf) for token in state.banned_token_ids)


class Candidates:
    """Rows of scores that are being cut: what is below a row's threshold is out.

    Cuts look among the likeliest tokens of a row; its other scores are read only where these do
    not settle the matter. Only thresholds are decided, so equal scores share their fate.

    Args:
        scores: ``[R, width]`` in fp32, logarithms of the tokens' weights; each row's highest is 0.
        selection: the operations that look through whole rows.
    """

    def __init__(self, scores: Tensor, selection: Selection) -> None:
        self.scores = scores
        self._selection = selection
        self.threshold = torch.full_like(scores[:, :1], -math.inf)
        self._untouched = True
        self._best, self._places = wide.largest(scores, _CANDIDATES)

    def raise_threshold(self, lowest: Tensor) -> None:
        """Put everything below ``lowest`` ``[R, 1]`` out."""
        self.threshold = torch.maximum(self.threshold, lowest)
        self._untouched = False

    def keep(self, measure: Callable[[Tensor], Tensor], wanted: Tensor) -> None:
        """Keep the likeliest tokens, as few as measure ``wanted`` ``[R, 1]`` together.

        Args:
            measure: of each token, from its score; not negative.
            wanted: 0 in rows that are not to be cut.
        """
        sums = measure(self._best).cumsum(dim=-1, dtype=torch.float64)
        place = (sums < wanted).sum(dim=-1, keepdim=True)
        lowest = self._best.gather(1, place.clamp(max=sums.shape[1] - 1))
        beyond = (place == sums.shape[1]).squeeze(1).nonzero().squeeze(1)
        for rows in beyond.split(_ROWS_AT_ONCE) if len(beyond) else ():
            scores = self.scores[rows]
            lowest[rows] = self._selection.lowest_kept(scores, measure(scores), wanted[rows])
        self.raise_threshold(lowest.masked_fill_(wanted <= 0, -math.inf))

    def mass(self, rows: Tensor) -> Tensor:
        """``[R, 1]``: the sum of the weights that are not out, where ``rows`` ``[R]`` is true."""
        mass = self._best_weights().sum(dim=-1, keepdim=True, dtype=torch.float64)
        unsettled = (self._unsettled() & rows).nonzero().squeeze(1)
        if len(unsettled):
            mass[unsettled] = wide.total(self._all_weights(unsettled))
        return mass

    def draw(self, numbers: Tensor) -> Tensor:
        """``[R]`` tokens for ``numbers`` ``[R]`` in [0, 1), by the inverse cumulative weight."""
        place = wide.locate(self._best_weights(), numbers)
        tokens = self._places.gather(1, place.unsqueeze(1)).squeeze(1)
        unsettled = self._unsettled().nonzero().squeeze(1)
        if len(unsettled):
            tokens[unsettled] = wide.locate(self._all_weights(unsettled), numbers[unsettled])
        return tokens

    def weights(self) -> Tensor:
        """``[R, width]``: of every token, 0 for those that are out."""
        return self._all_weights(torch.arange(len(self.scores), device=self.scores.device))

    def _unsettled(self) -> Tensor:
        """Rows ``[R]`` that may keep tokens beyond the likeliest."""
        return (self.threshold <= self._best[:, -1:]).squeeze(1)

    def _best_weights(self) -> Tensor:
        return self._best.exp().masked_fill_(self._best < self.threshold, 0)

    def _all_weights(self, rows: Tensor) -> Tensor:
        scores = wide.take(self.scores, rows)
        if self._untouched:
            return scores.exp()
        return scores.exp().masked_fill_(scores < self.threshold[rows], 0)


class Cut(ABC):
    """Puts unlikely tokens out."""

    @abstractmethod
    def asked(self, state: SampleState) -> bool:
        """Whether the row asks for it."""

    @abstractmethod
    def __call__(self, candidates: Candidates, states: Sequence[SampleState]) -> None:
        """Raise the thresholds of the rows that ask."""


class TopK(Cut):
    """Keeps the k highest scores, and ties of the last."""

    def asked(self, state: SampleState) -> bool:
        return state.params.top_k > 0

    def __call__(self, candidates: Candidates, states: Sequence[SampleState]) -> None:
        width = candidates.scores.shape[1]
        counts = column(
            states, lambda p: p.top_k if p.top_k < width else 0, candidates.scores.device
        )
        candidates.keep(torch.ones_like, counts)


class MinP(Cut):
    """Keeps tokens at least ``min_p`` times as likely as the likeliest (Min-p Sampling)."""

    def asked(self, state: SampleState) -> bool:
        return state.params.min_p > 0

    def __call__(self, candidates: Candidates, states: Sequence[SampleState]) -> None:
        # log(0) is -inf, which keeps everything in rows that do not ask.
        shares = column(states, lambda params: params.min_p, candidates.scores.device)
        candidates.raise_threshold(shares.log())


class TopP(Cut):
    """Keeps the smallest set of likeliest tokens with probability ``top_p``, and ties of its last.

    The Curious Case of Neural Text Degeneration, section 3.1.
    """

    def asked(self, state: SampleState) -> bool:
        return state.params.top_p < 1.0

    def __call__(self, candidates: Candidates, states: Sequence[SampleState]) -> None:
        shares = column(states, lambda params: params.top_p, candidates.scores.device)
        asked = shares < 1.0
        wanted = shares * candidates.mass(asked.squeeze(1))
        candidates.keep(torch.exp, wanted.masked_fill(~asked, 0))


def default_steps() -> list[ScoreStep]:
    """The usual changes of scores, in order."""
    return [RepetitionPenalty(), CountPenalties(), LogitBias(), Bans()]


def default_cuts() -> list[Cut]:
    """The usual cuts, in order: top-p's share is one of what the others leave."""
    return [TopK(), MinP(), TopP()]
