"""Rows that leave the stack of layers early: methods that decide which, and what waits behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from headrace.contracts.cache import PlaneSpec
from headrace.contracts.method import Method, ModelFacts, Property, of_kind
from headrace.contracts.step import PlanRow
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.ops.table import Ops

Chosen = TypeVar("Chosen", bound="DepthMethod")

Head = Callable[[Tensor], Tensor]
"""Norm and output head of a model: ``[R, hidden]`` -> ``[R, vocab]``."""

STREAM = "waiting_stream"
"""The plane of an exit that holds what tokens had reached there, ``[most, hidden]``, in order."""
COUNT = "num_waiting"
"""How many they are."""


class DepthMethod(Method):
    """Lets a row that generates leave before some layer, with logits of its own.

    What it has reached there waits: it goes through the layers behind with a later token of its
    sequence, before anybody reads what they cache of it. So their KV is the model's own for the
    tokens that were drawn. Prompts, and tokens that are fed again after a preemption, go through
    all layers.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.FULL_DEPTH,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.FULL_DEPTH})

    @property
    @abstractmethod
    def exits(self) -> tuple[int, ...]:
        """The layers before which rows may leave, ascending."""

    @property
    @abstractmethod
    def most_waiting(self) -> int:
        """Tokens of a sequence that wait at most; after that a row goes through all layers."""

    @abstractmethod
    def open(self, parts: ExitParts) -> Exits[Any]:
        """Make ready, once. Raises ValueError if something does not fit."""

    def check(self, model: ModelFacts) -> None:
        """Layers on both sides of each exit; KV behind the first must not go before it is made."""
        if not model.causal:
            raise ValueError("needs a model that generates; this one reads texts as a whole")
        if list(self.exits) != sorted(set(self.exits)):
            raise ValueError(f"layers must be ascending, got {', '.join(map(str, self.exits))}")
        last = len(model.layers) - 1
        for exit in self.exits:
            if not 1 <= exit <= last:
                raise ValueError(f"layers must be from 1 to {last} for this model, got {exit}")
        for layer in range(self.exits[0], last + 1):
            if model.layers[layer].window is not None:
                raise ValueError(
                    "needs layers behind an exit that keep all of their KV; layer "
                    f"{layer} here has a window"
                )

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """The prompt's: of others, layers may not have cached anything yet."""
        return prompt_tokens


@dataclass(frozen=True, slots=True)
class ExitParts:
    """What a method may use to make its exits ready.

    Args:
        hidden: width of the residual stream.
        ops: device and compute dtype.
    """

    hidden: int
    ops: Ops


class Exits(ABC, Generic[Chosen]):
    """What a method has made ready: heads in front of layers, and the decision to leave there."""

    @abstractmethod
    def answer(
        self, layer: int, hidden: Tensor, methods: Sequence[Chosen], head: Head
    ) -> tuple[Tensor, Tensor]:
        """Which rows leave before ``layer``, bool ``[R]``, and with what logits, ``[R, vocab]``.

        Args:
            hidden: the residual stream of the rows' last inputs there, ``[R, hidden]``. Where ops
                are batch-invariant, it is called for each row alone.
            methods: as each row chose it.
            head: of the model.
        """


class DepthRouter:
    """Decides in every step which rows go through which layers.

    Args:
        method: as the engine has it.

    Attributes:
        planes: (layer, plane) of scope "sequence": the tokens that wait before a layer.
    """

    def __init__(self, method: DepthMethod, model: DecoderModel, ops: Ops) -> None:
        with torch.inference_mode():
            first = torch.zeros(1, dtype=torch.int64, device=ops.device)
            stream = model.embed(first, first)
        self._method, self._ops = method, ops
        self._exits = method.open(ExitParts(stream.shape[1], ops))
        dtype = str(stream.dtype).removeprefix("torch.")
        planes = (
            PlaneSpec(STREAM, "sequence", method.most_waiting, stream.shape[1], dtype),
            PlaneSpec(COUNT, "sequence", 1, 1, "int32"),
        )
        self.planes = tuple((exit, plane) for exit in method.exits for plane in planes)

    def route(self, rows: Sequence[PlanRow], arena: KVArena, head: Head) -> Route | None:
        """How the rows of a step go; ``None`` if none of them has such a method."""
        chosen = [next(iter(of_kind(row.methods, DepthMethod)), None) for row in rows]
        owners = [row.table_row for row, method in zip(rows, chosen, strict=True) if method]
        if not owners:
            return None
        layers = self._method.exits
        states = {layer: arena.states(layer) for layer in layers}
        counts = torch.stack([states[layer][COUNT][owners, 0, 0] for layer in layers], 1).tolist()
        waiting = {
            owner: dict(zip(layers, each, strict=True))
            for owner, each in zip(owners, counts, strict=True)
        }
        ways = [
            _Way(
                number,
                row,
                method if generates_one(row) else None,
                waiting.get(row.table_row, {}),
            )
            for number, (row, method) in enumerate(zip(rows, chosen, strict=True))
        ]
        return Route(ways, states, self._method.most_waiting, partial(self._answer, head=head))

    def _answer(
        self, layer: int, hidden: Tensor, methods: Sequence[DepthMethod], head: Head
    ) -> tuple[list[bool], Tensor]:
        """``Exits.answer``, for each row alone where ops are batch-invariant."""
        size = 1 if self._ops.batch_invariant else len(hidden)
        found = [
            self._exits.answer(layer, part, methods[first : first + size], head)
            for first, part in zip(range(0, len(hidden), size), hidden.split(size), strict=True)
        ]
        leaving, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
        return leaving.tolist(), logits


def generates_one(row: PlanRow) -> bool:
    """Whether it feeds one token that was drawn, for the next one to be drawn."""
    return len(row.input_ids) == 1 and row.num_prompt == 0 and len(row.samples) == 1


_Answer = Callable[[int, Tensor, Sequence[DepthMethod]], tuple[list[bool], Tensor]]


@dataclass(slots=True)
class _Way:
    """A row on its way through the layers.

    Args:
        number: of the row in the step.
        row: as it is fed to the layers now.
        method: as the row chose it, if it may leave: it feeds one token that was drawn, for the
            next one to be drawn.
        waiting: exit -> tokens of its sequence that wait there.
    """

    number: int
    row: PlanRow
    method: DepthMethod | None
    waiting: dict[int, int]

    @property
    def passing(self) -> int:
        """Inputs of the layers that it is fed to."""
        return len(self.row.input_ids)

    def take_along(self, layer: int) -> None:
        """Feed what waits before a layer from there on, ahead of what is fed now."""
        row, more = self.row, self.waiting[layer]
        self.row = replace(
            row,
            input_ids=row.samples[0].output_token_ids[-more - self.passing :],
            positions=range(row.positions.start - more, row.positions.stop),
            slot=row.slot - more,
        )


class Route:
    """How the rows of a step go through the layers; the layer loop asks it before each exit.

    Invariant: the tokens that wait before a layer have gone through all layers before it and none
    from it on. Those that wait further up are older, and no token behind any of them has gone
    further.

    Args:
        ways: the rows, in the order of the step.
        states: exit -> its planes of scope "sequence".
        answer: see ``Exits.answer``.

    Attributes:
        exits: layers, ascending.
        logits: number of a row that has left -> with what, ``[vocab]``.
    """

    def __init__(
        self,
        ways: list[_Way],
        states: Mapping[int, Mapping[str, Tensor]],
        most_waiting: int,
        answer: _Answer,
    ) -> None:
        self.exits = tuple(states)
        self.logits: dict[int, Tensor] = {}
        self._inputs = [way.passing for way in ways]
        self._ways, self._states = ways, states
        self._most_waiting, self._answer = most_waiting, answer
        self._left: dict[int, Tensor] = {}

    @property
    def rows(self) -> list[PlanRow]:
        """What is fed to the layers behind the latest exit."""
        return [way.row for way in self._ways]

    def part(self, layer: int, hidden: Tensor) -> Tensor | None:
        """The residual stream that goes on from an exit, ``[T', hidden]``, row after row.

        Args:
            hidden: what has reached it, ``[T, hidden]``.

        Returns:
            ``None``: just this goes on, as the same rows.
        """
        spans = hidden.split([way.passing for way in self._ways])
        self._ask(layer, spans)
        going: list[_Way] = []
        pieces: list[Tensor] = []
        changed = False
        for way, span in zip(self._ways, spans, strict=True):
            waiting = way.waiting.get(layer, 0)
            if way.number in self.logits:
                self._left[way.number] = span
                stream = self._states[layer][STREAM][way.row.table_row]
                stream[waiting : waiting + way.passing] = span
                self._count(way, layer, waiting + way.passing)
            else:
                if waiting:
                    pieces.append(self._states[layer][STREAM][way.row.table_row, :waiting])
                    way.take_along(layer)
                    self._count(way, layer, 0)
                pieces.append(span)
                going.append(way)
            changed |= waiting > 0 or way.number in self.logits
        self._ways = going
        if not changed:
            return None
        return torch.cat(pieces) if pieces else hidden[:0]

    def _ask(self, layer: int, spans: Sequence[Tensor]) -> None:
        """Note the logits of the rows that leave before a layer."""
        asked = [
            (way, way.method, span[-1:])
            for way, span in zip(self._ways, spans, strict=True)
            if way.method and sum(way.waiting.values()) + way.passing <= self._most_waiting
        ]
        if not asked:
            return
        ways, methods, ends = zip(*asked, strict=True)
        leaving, logits = self._answer(layer, torch.cat(ends), methods)
        for way, leaves, row in zip(ways, leaving, logits, strict=True):
            if leaves:
                self.logits[way.number] = row

    def _count(self, way: _Way, layer: int, waiting: int) -> None:
        way.waiting[layer] = waiting
        self._states[layer][COUNT][way.row.table_row] = waiting

    def join(self, hidden: Tensor) -> Tensor:
        """Hidden states of all inputs of the step; of rows that left, what they had reached.

        Args:
            hidden: from the last layer, of the rows that went through all.
        """
        found = dict(self._left)
        spans = hidden.split([way.passing for way in self._ways])
        found |= {way.number: span for way, span in zip(self._ways, spans, strict=True)}
        return torch.cat([found[number][-count:] for number, count in enumerate(self._inputs)])

    def join_logits(self, rows: Sequence[int], computed: Tensor | None) -> Tensor:
        """``[R, vocab]`` for rows of the step, by their numbers.

        Args:
            computed: of those that did not leave, in this order; ``None``: all did.
        """
        others = iter(() if computed is None else computed)
        return torch.stack(
            [self.logits[row] if row in self.logits else next(others) for row in rows]
        )
