"""What guesses tokens: the contract, and the loop that most guessing comes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from headrace.contracts.drafting import DraftMethod
from headrace.contracts.method import Method
from headrace.contracts.step import PageTables, PlanRow, SampleState
from headrace.exec.decoding.verifier import DRAW, Chain, numbers
from headrace.exec.forward import Forward, LoadedModel
from headrace.exec.sampling import wide
from headrace.exec.sampling.sampler import Sampler


@dataclass(frozen=True, slots=True)
class DraftParts:
    """What a method may use to guess.

    Args:
        target: the engine's model, on the engine's cache. What is written into the slots behind a
            row's own is overwritten when the guesses are verified.
        sampler: how requests draw.
        load: the model at a path; raises ValueError if its tokens are others.
        table_rows: rows of the engine's page tables.
        context: tokens of a sequence at most.
        vocab_size: of the engine's model.
    """

    target: Forward
    sampler: Sampler
    load: Callable[[str], LoadedModel]
    table_rows: int
    context: int
    vocab_size: int


class Drafter(ABC):
    """What a method has made ready to guess tokens."""

    @abstractmethod
    def propose(self, rows: Sequence[PlanRow], tables: PageTables) -> list[Chain]:
        """At most ``draft_room`` tokens for each row, to come after its inputs; none is allowed.

        Each has to be drawn, with numbers of its own, from the distribution that it comes with.

        Args:
            rows: each feeds one input and has one sample, whose state knows all tokens.
            tables: the page tables of the engine's cache.
        """

    def observe(self, rows: Sequence[PlanRow], accepted: Sequence[int]) -> None:
        """So many of the tokens that were proposed for each row stay."""
        return None


class DrafterMethod(DraftMethod):
    """A method that guesses tokens."""

    __slots__ = ()

    @abstractmethod
    def open(self, parts: DraftParts) -> Drafter:
        """Make ready, once. Raises ValueError if something does not fit."""


def drafting_method(methods: Sequence[Method]) -> DraftMethod:
    """The one that guesses, of a row that has draft room."""
    return next(method for method in methods if isinstance(method, DraftMethod))


@dataclass(slots=True)
class Guess:
    """A chain that grows: tokens after those that ``state`` has, ``room`` of them at most.

    Attributes:
        start: tokens of the sequence before it.
    """

    row: PlanRow
    state: SampleState
    room: int
    tokens: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    @property
    def start(self) -> int:
        return len(self.state.prompt_token_ids) + len(self.state.output_token_ids)

    @property
    def known(self) -> list[int]:
        """All tokens of the sequence, guesses included."""
        return [*self.state.prompt_token_ids, *self.state.output_token_ids, *self.tokens]

    def chain(self) -> Chain:
        """What has been guessed."""
        return Chain(self.tokens, self.weights)

    def below(self, most: int) -> Guess:
        """What another model may guess here: one token less than there is room for."""
        room = min(most, self.room - len(self.tokens) - 1)
        return Guess(self.row, self.state.after(self.tokens), room)

    def as_row(self, slot: int) -> PlanRow:
        """The token before the guess, and the guess, as inputs of the engine's model.

        ``slot`` is where the input of the step's row goes.
        """
        last, row = self.start - 1, self.row
        before = self.state.output_token_ids or self.state.prompt_token_ids
        ids = [before[-1], *self.tokens]
        return replace(
            row,
            input_ids=ids,
            positions=range(last, last + len(ids)),
            slot=slot + last - row.positions[0],
            samples=(),
        )

    def grow(self, tokens: Sequence[int], weights: Tensor) -> None:
        """Add tokens and what they were drawn from, ``[length or more, width]``.

        Without any, the chain ends.
        """
        self.tokens += tokens
        self.weights += weights[: len(tokens)]
        if not tokens:
            self.room = len(self.tokens)


def guess_one_by_one(
    guesses: Sequence[Guess],
    next_logits: Callable[[Sequence[Guess]], Tensor],
    sampler: Sampler,
    level: int,
) -> None:
    """Draw until each has as many as there is room, as its request would draw them.

    A chain ends where the logits are not finite.

    Args:
        next_logits: for each, what follows its tokens, ``[R, vocab]``.
        level: of the hierarchy, whose draws are apart from others'.
    """
    while growing := [guess for guess in guesses if len(guess.tokens) < guess.room]:
        states = [guess.state.after(guess.tokens) for guess in growing]
        weights, usable = sampler.distributions(next_logits(growing), states)
        for guess, ok in zip(growing, usable, strict=True):
            guess.room = guess.room if ok else len(guess.tokens)
        drawing = [place for place, ok in enumerate(usable) if ok]
        if drawing:
            chosen = [states[place] for place in drawing]
            drawn = numbers(chosen, level, DRAW, weights.device)
            tokens = wide.locate(weights[drawing], drawn).tolist()
            for place, token in zip(drawing, tokens, strict=True):
                growing[place].grow([token], weights[place : place + 1])
