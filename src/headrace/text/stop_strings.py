"""Finding stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An automaton over all stop strings at once ("Efficient String Matching: An Aid to
    Bibliographic Search", 1975): the cost of a character does not depend on their number.

    A state is the longest suffix of the text so far that begins some stop string; 0 is the empty
    one. Immutable, so one instance serves any number of streams.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self._shorter = [0]
        self._lengths = [0]
        self._found: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for length, character in enumerate(string, start=1):
            following = self._edges[state].get(character)
            if following is None:
                following = len(self._edges)
                self._edges[state][character] = following
                self._edges.append({})
                self._shorter.append(0)
                self._lengths.append(length)
                self._found.append(None)
            state = following
        self._found[state] = string

    def _link(self) -> None:
        """Point every state to its longest proper suffix that is a state, shortest states first."""
        queue = deque(self._edges[0].values())
        while queue:
            state = queue.popleft()
            if self._found[state] is None:
                self._found[state] = self._found[self._shorter[state]]
            for character, following in self._edges[state].items():
                self._shorter[following] = self._step(self._shorter[state], character)
                queue.append(following)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._edges[state]:
            state = self._shorter[state]
        return self._edges[state].get(character, 0)

    def scan(self, state: int, text: str) -> tuple[int, int, str | None]:
        """Read ``text`` from ``state``, up to the first end of a stop string.

        Returns:
            The new state, the number of characters read, and the stop string that ends there
            (the longest, when several do) or ``None``.
        """
        for position, character in enumerate(text, start=1):
            state = self._step(state, character)
            if self._found[state] is not None:
                return state, position, self._found[state]
        return state, len(text), None

    def open_length(self, state: int) -> int:
        """Characters at the end of the text that may turn out to begin a stop string."""
        return self._lengths[state]
