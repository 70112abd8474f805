"""Finding stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of a request, searched for without going back in the text ("Fast Pattern
    Matching in Strings", 1977). Immutable, so one instance serves any number of streams.

    A stream's state is a list: for each string, how many of its first characters the text ends
    with at present.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        # Of several that end at the same character the longest is found.
        self._strings = sorted(strings, key=len, reverse=True)
        self._borders = [_borders(string) for string in self._strings]

    def start(self) -> list[int]:
        """The state before any text."""
        return [0] * len(self._strings)

    def scan(self, state: list[int], text: str) -> tuple[int, str | None]:
        """Read ``text``, up to the first end of a stop string, and bring ``state`` up to date.

        Returns:
            The number of characters read, and the stop string that ends there or ``None``.
        """
        for position, character in enumerate(text if self._strings else "", start=1):
            for index, string in enumerate(self._strings):
                state[index] = _extend(string, self._borders[index], state[index], character)
                if state[index] == len(string):
                    return position, string
        return len(text), None


def _borders(string: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that begins the string."""
    borders = [0]
    for character in string[1:]:
        borders.append(_extend(string, borders, borders[-1], character))
    return borders


def _extend(string: str, borders: list[int], matched: int, character: str) -> int:
    """How much of the string matches after ``character``, when ``matched`` did before it."""
    while matched and string[matched] != character:
        matched = borders[matched - 1]
    return matched + (string[matched] == character)
