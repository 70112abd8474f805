"""What decides which part of the KV cache stays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.contracts.method import Method, ModelFacts, Property


@dataclass(frozen=True, slots=True)
class SealedPages:
    """The sealed pages of one sequence, as a policy sees them when new ones have been added.

    Args:
        ordinals: of the pages that it holds, ascending; the first page that a sequence ever sealed
            is 0, and dropped ones are missing.
        sealed: pages that it has sealed so far, dropped ones included.
    """

    ordinals: Sequence[int]
    sealed: int


class KVPolicy(Method):
    """Decides at sealing which pages a sequence keeps.

    What it decides follows from its options and the view, so that a sequence that was preempted
    and computed again, or forked, goes on the same way.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.PLAIN_ENTRIES,
            Property.TOKEN_ORDER,
            Property.WHOLE_PAST,
            Property.FULL_DEPTH,
            Property.FED_TOKENS_STAY,
        }
    )
    kind_breaks = frozenset({Property.WHOLE_PAST})

    def check(self, model: ModelFacts) -> None:
        """It needs a model that generates, whose layers keep all of their KV."""
        if not model.causal:
            raise ValueError("needs a model that generates; this one reads texts as a whole")
        if any(layer.window is not None for layer in model.layers):
            raise ValueError("needs layers that keep all of their KV; some here have a window")
        if any(layer.of_scope("sequence") for layer in model.layers):
            raise ValueError(
                "needs layers that keep all of their KV; some here have a recurrent state"
            )

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """None: what was computed without a part of its past depends on when that was dropped."""
        return 0

    @abstractmethod
    def drop(self, views: Sequence[SealedPages]) -> list[list[int]]:
        """For each sequence of the step, the ordinals of the pages that are freed."""

    @abstractmethod
    def most_pages(self, sealed: int) -> int:
        """Pages that are left, at most, when so many have been sealed."""
