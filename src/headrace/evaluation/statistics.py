"""Intervals and paired differences, by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the interval that holds the true one with a probability of ``LEVEL``."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True)
class Difference:
    """How much larger the mean of the second of two paired samples is.

    Args:
        p_value: two-sided, of the hypothesis that there is no difference.
    """

    estimate: Estimate
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether chance alone would give as much in fewer than 1 - ``LEVEL`` of all cases."""
        return self.p_value < 1 - LEVEL


def mean_estimate(
    values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Estimate:
    """The mean of independent ``values`` (at least one), with its interval.

    Percentiles of resampled means; see Efron and Tibshirani, An Introduction to the Bootstrap,
    chapter 13. Where all values agree, the interval is that of the rule of succession, since
    resampling cannot show how many other values were missed.
    """
    sample = np.asarray(values, dtype=np.float64)
    shares = np.ones_like(sample) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float((sample * shares).sum() / shares.sum())
    if np.ptp(sample) == 0 and mean in (0.0, 1.0):
        unseen = 1 - (1 - LEVEL) ** (1 / len(sample))
        return Estimate(mean, max(0.0, mean - unseen), min(1.0, mean + unseen))
    means = _resampled(sample * shares, seed) / _resampled(shares, seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Difference:
    """How ``second`` differs from ``first``, item by item.

    The interval is a bootstrap's. The p-value is that of a test which exchanges the two of each
    pair at random, since that is exact whatever the distribution; see Noreen, Computer-Intensive
    Methods for Testing Hypotheses, chapter 2.

    Raises:
        ValueError: there are not as many of the one as of the other.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} results cannot be paired with {len(second)}")
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    means = _resampled(change, seed) / len(change)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    estimate = Estimate(float(change.mean()), float(low), float(high))
    generator = np.random.default_rng(seed + 1)
    signs = generator.integers(0, 2, (RESAMPLES, len(change)), dtype=np.int8) * 2 - 1
    # A little is taken off, so that equal sums count as equal whatever the order of additions.
    as_far = np.abs(signs @ change) >= abs(change.sum()) * (1 - 1e-9)
    return Difference(estimate, float((as_far.sum() + 1) / (RESAMPLES + 1)))


def _resampled(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], seed: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Sums of samples drawn with repetition; the same draws for the same seed and length."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    sums: np.ndarray[tuple[int], np.dtype[np.float64]] = counts @ values
    return sums
