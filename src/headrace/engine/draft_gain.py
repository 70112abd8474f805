"""Whether guessing tokens makes a sequence faster."""

from __future__ import annotations

_DECAY = 0.9
"""Weight of the past against the latest step."""
_FIRST = 2
"""Steps without guesses before the first with them: there has to be something to compare with."""
_TRIAL = 8
"""Steps with guesses before they are judged."""
_REST = 64
"""Steps without guesses before they are tried again."""


class _Rate:
    """Tokens and seconds of steps of one kind, the latest counting most."""

    __slots__ = ("seconds", "steps", "tokens")

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0
        self.steps = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens = self.tokens * _DECAY + tokens
        self.seconds = self.seconds * _DECAY + seconds
        self.steps += 1


class DraftGain:
    """Compares a sequence's tokens per second with guesses and without, as they are measured.

    It begins without, tries, and goes on as long as that is at least as fast; else it rests before
    it tries again.
    """

    __slots__ = ("_drafted", "_plain", "_resting")

    def __init__(self) -> None:
        self._plain, self._drafted = _Rate(), _Rate()
        self._resting = _FIRST

    @property
    def pays(self) -> bool:
        """Whether the next step should guess."""
        return self._resting == 0

    def note(self, tokens: int, seconds: float, drafted: bool) -> None:
        """A step took ``seconds`` and gave the sequence so many ``tokens``."""
        if not drafted:
            self._plain.add(tokens, seconds)
            self._resting = max(0, self._resting - 1)
            return
        self._drafted.add(tokens, seconds)
        slower = (
            self._drafted.tokens * self._plain.seconds < self._plain.tokens * self._drafted.seconds
        )
        if self._drafted.steps >= _TRIAL and slower:
            self._drafted, self._resting = _Rate(), _REST
