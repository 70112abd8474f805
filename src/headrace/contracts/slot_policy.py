"""What decides, head by head, which slots of the KV cache stay."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headrace.contracts.method import Method, ModelFacts, Property

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class CompactionSchedule:
    """When the slots of a sequence are reduced: a function of the tokens that it has fed.

    No step feeds beyond such a point, or beyond the beginning of the inputs that are observed
    before it; so what is left does not depend on the chunks that a text is read in.

    Args:
        budget: slots that are left in every layer and head.
        interval: tokens from one compaction to the next.
        window: the attention of so many inputs before each is observed.
    """

    budget: int
    interval: int
    window: int

    @property
    def first(self) -> int:
        """Tokens at the first compaction: the first multiple of the interval above the budget."""
        return (self.budget // self.interval + 1) * self.interval

    def is_due(self, fed: int) -> bool:
        """Whether slots are reduced when so many tokens have been fed."""
        return fed >= self.first and fed % self.interval == 0

    def next_due(self, fed: int) -> int:
        """The first compaction behind so many tokens."""
        return max(self.first, (fed // self.interval + 1) * self.interval)

    def observes(self, fed: int) -> bool:
        """Whether the attention of the input behind so many tokens is observed."""
        return self.next_due(fed) - fed <= self.window

    def next_stop(self, fed: int) -> int:
        """How many tokens may have been fed, at most, when the step ends."""
        due = self.next_due(fed)
        return due if self.observes(fed) else due - self.window

    def slots(self, fed: int) -> int:
        """Slots of a sequence that has fed so many tokens, after a compaction that is due."""
        return fed if fed < self.first else self.budget + fed % self.interval

    def most_slots(self, tokens: int) -> int:
        """Slots that a sequence of so many tokens has at once, the copy at compactions included."""
        if tokens < self.first:
            return tokens
        return max(self.first, self.budget + self.interval) + self.budget


class SlotPolicy(Method):
    """Decides at fixed points which slots a sequence keeps; every head may keep different ones.

    How many stay is known beforehand, so that memory is reserved and returned without knowing
    which; those are chosen where the tensors are.

    Attributes:
        adds_up: whether only the sum of what queries gave to a slot matters: several may then come
            as one.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.PLAIN_ENTRIES,
            Property.TOKEN_ORDER,
            Property.WHOLE_PAST,
            Property.FULL_DEPTH,
            Property.FED_TOKENS_STAY,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.TOKEN_ORDER, Property.WHOLE_PAST})
    adds_up: ClassVar[bool] = False

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

    @abstractmethod
    def schedule(self, block_size: int) -> CompactionSchedule:
        """When slots are reduced; ``budget`` and ``interval`` are multiples of ``block_size``."""

    @abstractmethod
    def observe(self, known: Tensor, weights: Tensor, past: int) -> None:
        """Take note of attention: of each query for itself, since they come in any parts.

        Args:
            known: fp32 ``[kv_heads, slots]``: a number for each slot of a sequence in a layer, to
                be changed; zero at first.
            weights: fp32 ``[kv_heads, queries, slots]``: the probabilities that consecutive queries
                gave to the slots, the mean of the heads that share a KV head.
            past: slots before the first query's own.
        """

    @abstractmethod
    def rank(self, known: Tensor) -> Tensor:
        """fp32 ``[kv_heads, slots]``: those with the highest stay. Slots are in order of age."""

    def carry(self, known: Tensor) -> Tensor:
        """What is known afterwards of the slots that stay, ``[kv_heads, budget]``: nothing.

        Where something is, ``shared_tokens`` must be 0: it is not kept beside shared pages.
        """
        return known * 0
