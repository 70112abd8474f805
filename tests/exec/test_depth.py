"""Routes through the layers: each layer sees each token once, in order, whoever leaves where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.contracts.cache import CacheLayout
from headrace.contracts.method import MethodCard
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import PlanRow, SampleState
from headrace.exec.depth import DepthMethod, DepthRouter, ExitParts, Exits, Head
from headrace.exec.route import Route
from headrace.kv.arena import KVArena
from headrace.ops.device import resolve_device
from headrace.ops.table import Ops, make_ops

LAYERS = 6


@dataclass(frozen=True, slots=True)
class Scripted(DepthMethod):
    """Leaves where it is told to."""

    card: ClassVar[MethodCard] = MethodCard("", "Leaves where it is told to.", "lossy")
    at: tuple[int, ...] = (2, 4)
    most: int = 3

    @property
    def exits(self) -> tuple[int, ...]:
        return self.at

    @property
    def most_waiting(self) -> int:
        return self.most

    def open(self, parts: ExitParts) -> Script:
        assert parts.hidden == 2
        return Script()


class Script(Exits[Scripted]):
    """``wishes``: position -> the exit that a token would like to leave at."""

    def __init__(self) -> None:
        self.wishes: dict[int, int] = {}

    def answer(
        self, layer: int, hidden: Tensor, methods: Sequence[Scripted], head: Head
    ) -> tuple[Tensor, Tensor]:
        positions = hidden[:, 0].int().tolist()
        leaving = [self.wishes.get(position) == layer for position in positions]
        return torch.tensor(leaving), head(hidden)


class Positions:
    """A model whose residual stream is a token's position and the layers that it went through."""

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return torch.stack((positions, positions * 0), 1).float()


class Sequences:
    """Feeds sequences of which each layer notes what it has seen."""

    def __init__(self, method: Scripted, batch_invariant: bool = False, rows: int = 4) -> None:
        ops: Ops = make_ops(resolve_device("cpu"), "float32", batch_invariant=batch_invariant)
        self.method = method
        self.router = DepthRouter(method, cast(Any, Positions()), ops)
        self.script = cast(Script, self.router._exits)
        layout = CacheLayout(4, (), method_states=self.router.planes)
        self.arena = KVArena(layout, 1, "cpu", rows)
        self.seen: dict[int, list[list[int]]] = {}

    def row(self, number: int, first: int, count: int, prompt: int, plain: bool = False) -> PlanRow:
        """Tokens are their positions."""
        output = list(range(prompt, first + count))
        state = SampleState(SamplingParams(), list(range(prompt)), output, 0)
        return PlanRow(
            sequence=number,
            table_row=number,
            input_ids=list(range(first, first + count)),
            positions=range(first, first + count),
            slot=first,
            samples=[state],
            methods=() if plain else (self.method,),
            num_prompt=min(count, max(0, prompt - first)),
        )

    def step(self, rows: list[PlanRow]) -> tuple[Tensor, Route]:
        """As the layer loop does it; hidden states, and where rows left."""
        for row in rows:
            if row.slot == 0:
                self.arena.clear_states([row.table_row])
                self.seen[row.table_row] = [[] for _ in range(LAYERS)]
        positions = torch.tensor([place for row in rows for place in row.positions])
        hidden = Positions().embed(positions, positions)
        route = self.router.route(rows, self.arena, lambda hidden: hidden * 10)
        assert route is not None
        first = 0
        for layer in (*route.exits, LAYERS):
            hidden = self._run(route.rows, hidden, first, layer)
            first = layer
            if layer < LAYERS:
                parted = route.part(layer, hidden)
                hidden = hidden if parted is None else parted
        return route.join(hidden), route

    def _run(self, rows: list[PlanRow], hidden: Tensor, first: int, end: int) -> Tensor:
        place = 0
        for row in rows:
            count = len(row.input_ids)
            inputs = hidden[place : place + count].int().tolist()
            assert list(row.input_ids) == list(row.positions) == [each for each, _ in inputs]
            assert all(passed == first for _, passed in inputs)
            for layer in range(first, end):
                assert len(self.seen[row.table_row][layer]) == row.slot
                self.seen[row.table_row][layer] += row.input_ids
            place += count
        return hidden + torch.tensor([0.0, end - first])


@settings(deadline=None)
@given(
    at=st.sets(st.integers(1, LAYERS - 1), min_size=1, max_size=3),
    most=st.integers(1, 5),
    wishes=st.lists(st.sampled_from((0, 0, 1, 2, 3)), min_size=1, max_size=24),
    batch_invariant=st.booleans(),
)
def test_each_layer_sees_each_token_once_and_in_order(
    at: set[int], most: int, wishes: list[int], batch_invariant: bool
) -> None:
    exits = tuple(sorted(at))
    sequences = Sequences(Scripted(exits, most), batch_invariant)
    wanted = [exits[each - 1] if 0 < each <= len(exits) else LAYERS for each in wishes]
    sequences.script.wishes = dict(enumerate(wanted, start=3))
    sequences.step([sequences.row(0, 0, 3, prompt=3)])
    for place in range(3, 3 + len(wishes)):
        # A plain one beside it: another is fed in parts, and never leaves.
        rows = [sequences.row(1, place - 3, 1, 99, plain=True), sequences.row(0, place, 1, 3)]
        hidden, route = sequences.step(rows)
        assert hidden[:, 0].tolist() == [place - 3, place]
        assert hidden[0, 1] == LAYERS
        reached = int(hidden[1, 1])
        assert (reached < LAYERS) == (1 in route.logits)
        assert reached in (wanted[place - 3], LAYERS)
        if reached < LAYERS:
            assert route.logits[1].tolist() == [10 * place, 10 * reached]
        lengths = [len(layer) for layer in sequences.seen[0]]
        assert lengths[0] == place + 1
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= most
        if wanted[place - 3] < reached:
            assert len(set(lengths)) == 1, "it had to go on, and so did all"
    assert all(layer == list(range(len(layer))) for layer in sequences.seen[0])
    assert all(len(layer) == len(wishes) for layer in sequences.seen[1])


def test_rows_that_parted_have_their_own() -> None:
    sequences = Sequences(Scripted())
    sequences.script.wishes = {2: 2, 3: 4, 4: 2}
    sequences.step([sequences.row(0, 0, 2, prompt=2)])
    sequences.step([sequences.row(0, 2, 1, prompt=2)])
    sequences.arena.copy_states([(0, 3)])
    sequences.seen[3] = [list(layer) for layer in sequences.seen[0]]
    sequences.step([sequences.row(0, 3, 1, prompt=2)])
    assert [len(layer) for layer in sequences.seen[0]] == [4, 4, 4, 4, 2, 2]
    assert [len(layer) for layer in sequences.seen[3]] == [3, 3, 2, 2, 2, 2]
    sequences.script.wishes = {}
    sequences.step([sequences.row(0, 4, 1, prompt=2), sequences.row(3, 3, 1, prompt=2)])
    assert all(layer == list(range(5)) for layer in sequences.seen[0])
    assert all(layer == list(range(4)) for layer in sequences.seen[3])


def test_what_never_leaves() -> None:
    """A prompt, even of one token; what is fed again; a row that several tokens are drawn from."""
    sequences = Sequences(Scripted())
    sequences.script.wishes = dict.fromkeys(range(9), 2)
    prompt = sequences.row(0, 0, 1, prompt=1)
    again = sequences.row(1, 0, 4, prompt=2)
    hidden, route = sequences.step([prompt, again])
    assert hidden[:, 1].tolist() == [LAYERS] * 5
    assert not route.logits
    parting = sequences.row(0, 1, 1, prompt=1)
    parting.samples = [*parting.samples] * 2
    ended = sequences.row(1, 4, 1, prompt=2)
    ended.samples = ()
    hidden, route = sequences.step([parting, ended])
    assert not route.logits


def test_steps_without_such_rows_have_no_route() -> None:
    sequences = Sequences(Scripted())
    rows = [sequences.row(0, 0, 3, prompt=3, plain=True)]
    assert sequences.router.route(rows, sequences.arena, lambda hidden: hidden) is None


def test_logits_are_put_together_in_the_order_of_the_rows() -> None:
    sequences = Sequences(Scripted())
    sequences.script.wishes = {2: 2}
    rows = [sequences.row(number, 0, 2, prompt=2) for number in range(3)]
    sequences.step(rows)
    rows = [sequences.row(0, 2, 1, 2, plain=True), sequences.row(1, 2, 1, 2)]
    _, route = sequences.step(rows)
    joined = route.join_logits([0, 1], torch.tensor([[1.0, 2.0]]))
    assert joined.tolist() == [[1.0, 2.0], [20.0, 20.0]]
    assert route.join_logits([1], None).tolist() == [[20.0, 20.0]]
