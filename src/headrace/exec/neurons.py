"""Feed-forward layers in part: methods that choose which inner neurons a request goes through."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.cache import PlaneSpec
from headrace.contracts.load_map import GatedNames
from headrace.contracts.method import Method, Property, of_kind
from headrace.contracts.step import PlanRow
from headrace.kv.arena import KVArena, States
from headrace.models.base import (
    DecoderModel,
    DividedFeedForward,
    NeuronRoutes,
    NeuronStep,
)
from headrace.ops.neurons import Activation, NeuronProduct
from headrace.ops.selection import Selection

CHOSEN = "chosen_neurons"
"""The plane of every layer that holds what was chosen: int32 ``[neurons]``, -1 behind the last."""


class NeuronMethod(Method):
    """Chooses by a request's prompt which inner neurons its generated tokens go through.

    The prompt goes through all neurons, so its KV is exact. What is seen of it is kept in planes
    of scope "sequence", which follow a sequence through chunks and forks; a sequence that was
    preempted feeds its prompt again, and then what it had generated in part.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.ALL_NEURONS,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.ALL_NEURONS})
    needs_all_inputs: ClassVar[bool] = True
    takes_adapters: ClassVar[bool] = False

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """The prompt's: it goes through all neurons."""
        return prompt_tokens

    def boundaries(self, prompt_tokens: int) -> tuple[int, ...]:
        """The prompt's end: there the neurons are chosen."""
        return (prompt_tokens,)

    @abstractmethod
    def statistics(self, neurons: int) -> tuple[PlaneSpec, ...]:
        """What it keeps of a layer with so many neurons, of scope "sequence"; zeros at first."""

    @abstractmethod
    def kept(self, neurons: int) -> int:
        """How many of a layer's neurons are chosen: at least 1, at most all."""

    @abstractmethod
    def observe(
        self, inner: Tensor, statistics: Mapping[str, Tensor], selection: Selection
    ) -> None:
        """Bring the statistics up to date with inputs of a prompt, in their order.

        Args:
            inner: ``[T, neurons]`` in the compute dtype: ``activation(gate(x)) * up(x)``.
            statistics: name of a plane -> ``[heads, width]``, changed in place.
            selection: searches in wide rows.
        """

    @abstractmethod
    def choose(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """At the prompt's end, the chosen neurons, int64 ``[kept]``, ascending."""


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """Inputs ``[first, end)`` of those that go through all neurons: a chunk of a prompt.

    Args:
        method: of the request, as it chose it.
        table_row: where its statistics are.
        last: whether the prompt ends with them.
    """

    method: NeuronMethod
    table_row: int
    first: int
    end: int
    last: bool


class DividedStep(NeuronStep):
    """See ``NeuronStep``.

    Args:
        prompts: the chunks among the ``whole`` inputs that methods take note of.
        rows: int64 ``[n]``: the table rows of the ``partial`` inputs.
        methods: of these inputs, without repetition.
        states: layer -> its planes of scope "sequence".
        selection: searches for methods.
    """

    def __init__(
        self,
        whole: Tensor | None,
        partial: Tensor | None,
        prompts: Sequence[PromptInputs],
        rows: Tensor,
        methods: Sequence[NeuronMethod],
        states: Callable[[int], States],
        selection: Selection,
    ) -> None:
        self.whole, self.partial = whole, partial
        self._prompts, self._rows, self._methods = prompts, rows, methods
        self._states, self._selection = states, selection

    def observe(self, layer: int, inner: Tensor) -> None:
        states = self._states(layer)
        for prompt in self._prompts:
            method = prompt.method
            names = [plane.name for plane in method.statistics(inner.shape[1])]
            statistics = {name: states[name][prompt.table_row] for name in names}
            method.observe(inner[prompt.first : prompt.end], statistics, self._selection)
            if prompt.last:
                chosen = method.choose(statistics)
                entry = states[CHOSEN][prompt.table_row, 0]
                entry.fill_(-1)
                entry[: len(chosen)] = chosen

    def chosen(self, layer: int) -> Tensor:
        entries = self._states(layer)[CHOSEN][:, 0]
        most = max(method.kept(entries.shape[1]) for method in self._methods)
        return entries[self._rows, :most]


class NeuronRouter:
    """Sends the inputs of a step through all inner neurons or through some.

    Args:
        method: that chooses, as the engine has it.
        layers: the feed-forward of each layer.
        load: makes its weights ready neuron by neuron.
        selection: searches for methods.

    Attributes:
        routes: what the layer loop sets.
        planes: (layer, plane) of scope "sequence".
        num_bytes: of the weights.
    """

    def __init__(
        self,
        method: NeuronMethod,
        layers: Sequence[DividedFeedForward],
        load: Callable[[GatedNames, Activation], NeuronProduct],
        selection: Selection,
    ) -> None:
        self.routes, self._selection = NeuronRoutes(), selection
        self.num_bytes = 0
        planes: list[tuple[int, PlaneSpec]] = []
        for index, layer in enumerate(layers):
            product = load(layer.names, layer.activation)
            self.num_bytes += product.num_bytes
            layer.divide(index, product, self.routes)
            neurons = layer.names.neurons
            own = PlaneSpec(CHOSEN, "sequence", 1, neurons, "int32")
            planes += [(index, plane) for plane in (own, *method.statistics(neurons))]
        self.planes = tuple(planes)

    def step(self, rows: Sequence[PlanRow], arena: KVArena, adapted: bool) -> NeuronStep | None:
        """How the inputs of a micro-batch go; ``None`` if no row has such a method.

        With ``adapted`` rows, all inputs go through all neurons, since adapted products take all
        inputs of a micro-batch; some of them then go through some neurons as well.
        """
        chosen = [next(iter(of_kind(row.methods, NeuronMethod)), None) for row in rows]
        if all(method is None for method in chosen):
            return None
        whole: list[int] = []
        partial: list[int] = []
        table_rows: list[int] = []
        prompts: list[PromptInputs] = []
        place = 0
        for row, method in zip(rows, chosen, strict=True):
            inputs = range(place, place + len(row.input_ids))
            place = inputs.stop
            is_partial = method is not None and row.num_prompt == 0
            if is_partial:
                partial += inputs
                table_rows += [row.table_row] * len(inputs)
            if adapted or not is_partial:
                first = len(whole)
                whole += inputs
            if method is not None and not is_partial:
                spans = (row.table_row, first, len(whole), row.ends_prompt)
                prompts.append(PromptInputs(method, *spans))
        methods = [m for m, row in zip(chosen, rows, strict=True) if m and row.num_prompt == 0]
        device = arena.pages.device
        in_part, of_rows = (torch.tensor(each, device=device) for each in (partial, table_rows))
        return DividedStep(
            torch.tensor(whole, device=device) if whole and partial else None,
            in_part if partial else None,
            prompts,
            of_rows,
            list(dict.fromkeys(methods)),
            arena.states,
            self._selection,
        )


def gated_layers(model: DecoderModel) -> list[DividedFeedForward]:
    """The feed-forward of each layer. Raises ValueError if one has none that is gated."""
    found = [layer.gated for layer in model.layers]
    for index, gated in enumerate(found):
        if gated is None:
            raise ValueError(
                "needs a gated feed-forward in every layer, as Llama has; that of layer "
                f"{index} here is of experts, of another kind, or missing"
            )
    return [gated for gated in found if gated is not None]
