"""Intervals hold what they promise, and equal things are found equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.evaluation.statistics import mean_estimate, paired_difference


def test_intervals_cover_the_true_mean() -> None:
    generator = np.random.default_rng(0)
    trials = 300
    covered = 0
    for trial in range(trials):
        sample = (generator.random(80) < 0.3).astype(float)
        estimate = mean_estimate(list(sample), seed=trial)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= covered / trials <= 0.99


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.0582), (1.0, 0.9418, 1.0)])
def test_equal_results_leave_room_for_others(value: float, low: float, high: float) -> None:
    estimate = mean_estimate([value] * 50)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(
        (value, low, high), abs=1e-4
    )


def test_weights_count() -> None:
    assert mean_estimate([1.0, 3.0], [3.0, 1.0]).mean == 1.5


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_nothing_differs_from_itself(values: list[float]) -> None:
    difference = paired_difference(values, values)
    assert difference.estimate.mean == 0
    assert difference.p_value == 1 and not difference.is_significant


def test_chance_is_significant_as_often_as_it_may_be() -> None:
    generator = np.random.default_rng(1)
    trials = 300
    found = 0
    for trial in range(trials):
        first, second = (generator.random((2, 100)) < 0.5).astype(float)
        found += paired_difference(list(first), list(second), seed=trial).is_significant
    assert found / trials <= 0.08


def test_a_real_difference_is_found() -> None:
    generator = np.random.default_rng(2)
    first = (generator.random(500) < 0.6).astype(float)
    second = np.where(generator.random(500) < 0.15, 0.0, first)
    difference = paired_difference(list(first), list(second))
    assert difference.is_significant
    assert difference.estimate.high < 0


def test_pairs_need_partners() -> None:
    with pytest.raises(ValueError, match="3 results cannot be paired with 2"):
        paired_difference([1, 2, 3], [1, 2])
