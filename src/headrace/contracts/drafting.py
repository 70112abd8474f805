"""What guesses tokens ahead, as the engine sees it."""

from __future__ import annotations

from abc import abstractmethod

from headrace.contracts.method import Method, ModelFacts, Property


class DraftMethod(Method):
    """Guesses tokens that the model then checks all at once.

    What comes out is distributed as if the model had drawn every token itself; greedily drawn, the
    tokens are the same.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.WHOLE_PAST,
            Property.FULL_DEPTH,
            Property.FED_TOKENS_STAY,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.FED_TOKENS_STAY})

    def check(self, model: ModelFacts) -> None:
        """It needs a model that draws tokens, and from whose cache the last ones can be taken."""
        if not model.causal:
            raise ValueError("needs a model that generates")
        if any(layer.of_scope("sequence") for layer in model.layers):
            raise ValueError(
                "needs a cache from which wrong tokens can be taken back; some layers here have a "
                "recurrent state"
            )

    def cache_key(self) -> Method | None:
        """Guesses leave nothing behind."""
        return None

    @property
    @abstractmethod
    def most_drafted(self) -> int:
        """Tokens that are guessed in one step at most."""

    @property
    def always_on(self) -> bool:
        """Whether it goes on where it does not make a sequence faster."""
        return False
