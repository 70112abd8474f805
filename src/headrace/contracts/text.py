"""How the engine turns tokens into text and finds stop strings, without knowing a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from headrace.contracts.sampling import SamplingParams


class TextStream(ABC):
    """Detokenizes one sequence token by token.

    Text is released only when no later token can change it or turn it into a stop string.
    """

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain (may be empty)."""

    @abstractmethod
    def finish(self) -> str:
        """No more tokens come; return what was held back."""

    @property
    @abstractmethod
    def stopped_by(self) -> str | None:
        """The stop string that was met; nothing more is released after it."""


TextStreamFactory = Callable[[SamplingParams], "TextStream | None"]
