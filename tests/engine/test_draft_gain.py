"""Guessing goes on as long as it is measured to be at least as fast."""

from __future__ import annotations

from headrace.engine.draft_gain import DraftGain


def drive(gain: DraftGain, steps: int, seconds: float, tokens: int) -> list[bool]:
    """Whether each step guessed; one with guesses takes ``seconds`` and gives ``tokens``."""
    guessed = []
    for _ in range(steps):
        guessed.append(gain.pays)
        if gain.pays:
            gain.note(tokens, seconds, drafted=True)
        else:
            gain.note(1, 1.0, drafted=False)
    return guessed


def test_it_begins_without_and_goes_on_where_it_pays() -> None:
    assert drive(DraftGain(), 200, seconds=1.9, tokens=2) == [False] * 2 + [True] * 198
    assert drive(DraftGain(), 20, seconds=2.0, tokens=2) == [False] * 2 + [True] * 18


def test_it_rests_where_it_does_not_pay_and_tries_again() -> None:
    guessed = drive(DraftGain(), 2 + 2 * (8 + 64), seconds=2.1, tokens=2)
    assert guessed == [False] * 2 + 2 * ([True] * 8 + [False] * 64)


def test_it_sees_changes() -> None:
    gain = DraftGain()
    assert all(drive(gain, 60, seconds=1.5, tokens=3)[2:])
    later = drive(gain, 40, seconds=1.5, tokens=1)
    assert 1 < later.index(False) < 20
    gain = DraftGain()
    drive(gain, 10, seconds=1.5, tokens=1)
    assert not gain.pays
    assert all(drive(gain, 100, seconds=1.5, tokens=3)[64:])


def test_a_clock_that_stands_still_changes_nothing() -> None:
    gain = DraftGain()
    for _ in range(50):
        gain.note(1, 0.0, drafted=gain.pays)
    assert gain.pays
