"""What every method is to the rest of Headrace: options, a card, and what it needs of a model."""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, TypeVar

from headrace.contracts.cache import LayerState

Kind = TypeVar("Kind", bound="Method")

Guarantee = Literal["exact", "distribution", "lossy"]
"""The same tokens; tokens of the same distribution; something else, whose cost is measured."""


class Property(Enum):
    """What the engine guarantees, as long as no method that is on breaks it."""

    PLAIN_ENTRIES = "cached keys and values are stored as attention computes with them"
    TOKEN_ORDER = "slots hold the tokens in their order, the same ones in every head"
    WHOLE_PAST = "the cache holds every token of the past, in every layer and head"
    OWN_CONTEXT = "a sequence sees its own tokens and no others"
    ALL_NEURONS = "every token goes through all inner neurons of the feed-forward layers"
    FULL_DEPTH = "a token has gone through its layers before the next one is fed"
    FED_TOKENS_STAY = "a token that is fed belongs to its sequence"
    IN_MEMORY = "weights and KV pages stay where they are, in memory"

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class MethodCard:
    """What people and the check at start know of a method.

    Args:
        title: of its paper; empty if it has none.
        summary: what it does, in a sentence.
        guarantee: of its results.
        requires, breaks: properties, beside those of its kind.
        request_options: options that a request may set for itself; ``None``: it is the engine's,
            and no request can be without it.
    """

    title: str
    summary: str
    guarantee: Guarantee
    requires: frozenset[Property] = frozenset()
    breaks: frozenset[Property] = frozenset()
    request_options: tuple[str, ...] | None = ()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a method may ask of a model before it is loaded.

    Args:
        layers: what each keeps of a sequence.
        context: tokens of a sequence at most.
        causal: whether a token is computed from those before it alone.
        block_size: slots of a page of its cache.
        rotary: whether positions reach it only as rotations of queries and keys in attention.
        sure_inputs: of a step, whatever else is in it, for the sequence that is first in order.
        stages: layers before which another stage begins, whose slots are counted apart.
    """

    layers: tuple[LayerState, ...]
    context: int
    vocab_size: int
    causal: bool
    block_size: int = 16
    rotary: bool = True
    sure_inputs: int = sys.maxsize
    stages: tuple[int, ...] = ()


class Method(ABC):
    """A frozen dataclass whose fields are its options; its file is named after it.

    It has no state: what a request computes follows from its tokens and from its methods, which
    are compared by value. Its constructor raises ValueError for options out of range.
    """

    __slots__ = ()
    card: ClassVar[MethodCard]
    kind_requires: ClassVar[frozenset[Property]] = frozenset()
    kind_breaks: ClassVar[frozenset[Property]] = frozenset()
    """What the way in which its kind works requires and breaks, whatever the method does by it."""
    needs_all_inputs: ClassVar[bool] = False
    """Whether it has to see every input of a request: none is left out since its KV is known."""
    takes_adapters: ClassVar[bool] = True
    """Whether a request may have an adapter beside it."""

    @classmethod
    def name(cls) -> str:
        """As it is chosen: that of its file."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def requires(cls) -> frozenset[Property]:
        """Properties that it needs."""
        return cls.card.requires.union(*(vars(kind).get("kind_requires", ()) for kind in cls.mro()))

    @classmethod
    def breaks(cls) -> frozenset[Property]:
        """Properties that others cannot rely on beside it."""
        return cls.card.breaks.union(*(vars(kind).get("kind_breaks", ()) for kind in cls.mro()))

    @classmethod
    def preserves(cls) -> frozenset[Property]:
        """Properties that it leaves as they are."""
        return frozenset(Property) - cls.breaks()

    def check(self, model: ModelFacts) -> None:
        """Raise ValueError if the model lacks what it needs, saying what."""
        return None

    def check_choice(self, loaded: Method, model: ModelFacts) -> None:
        """Raise ValueError if a request cannot have it in place of ``loaded``, saying why."""
        return None

    def cache_key(self) -> Method | None:
        """What KV bytes depend on of it, as a method; ``None``: they are the plain model's."""
        return self

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """How many tokens of a sequence have KV that follows from them alone.

        Only their pages are shared with sequences that begin alike and have the same methods.
        ``None``: all. What depends on where the prompt ends is not to be shared.
        """
        return None

    def boundaries(self, prompt_tokens: int) -> tuple[int, ...]:
        """Counts of prompt tokens at which a chunk has to end: the rest is fed in later steps."""
        return ()


def of_kind(methods: Sequence[Method], kind: type[Kind]) -> list[Kind]:
    """Those that extend the engine in one way: what a method is a kind of says where it joins."""
    return [method for method in methods if isinstance(method, kind)]


def conflict(methods: Sequence[Method]) -> str | None:
    """Why these methods do not go together; ``None`` if they do."""
    names = [method.name() for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"{twice} is chosen twice"
    for breaker in methods:
        for other in methods:
            broken = breaker.breaks() & other.requires()
            if other is not breaker and broken:
                reason = min(each.value for each in broken)
                return f"{other.name()} needs that {reason}, which {breaker.name()} breaks"
    return None
