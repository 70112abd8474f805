"""Real and virtual time."""

from __future__ import annotations

import pytest

from headrace.engine.clock import MonotonicClock, VirtualClock


def test_wall_time_never_goes_back() -> None:
    clock = MonotonicClock()
    times = [clock.now() for _ in range(100)]
    assert times == sorted(times)


def test_virtual_time_moves_only_when_told() -> None:
    clock = VirtualClock(5.0)
    assert clock.now() == clock.now() == 5.0
    clock.advance(0.5)
    clock.advance(0.0)
    assert clock.now() == 5.5


def test_virtual_time_advances_to_an_instant_but_never_back() -> None:
    clock = VirtualClock()
    clock.advance_to(3.0)
    assert clock.now() == 3.0
    clock.advance_to(1.0)
    assert clock.now() == 3.0
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-0.1)
