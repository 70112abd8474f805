"""CoreInfer: what is generated goes through the neurons that mattered most to the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headrace.contracts.cache import PlaneSpec
from headrace.contracts.method import MethodCard
from headrace.exec.neurons import NeuronMethod
from headrace.ops.selection import Selection

_COUNTS = "core_counts"


@dataclass(frozen=True, slots=True)
class CoreInfer(NeuronMethod):
    """Generate with the neurons that are most often among the core neurons of the prompt's tokens.

    The core neurons of a token are those that it activates most strongly (section 3.1); those of a
    sentence are the most frequent among them, and are fixed at the end of the prompt (section 4).

    Args:
        keep: share of a layer's neurons that generated tokens go through.
        core: share of the neurons with a positive activation that are a token's core.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title=(
            "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired "
            "Adaptive Sparse Activation"
        ),
        summary="Generates with the feed-forward neurons that the prompt activates most often.",
        guarantee="lossy",
        request_options=("keep", "core"),
    )
    keep: float = 0.4
    core: float = 0.4

    def __post_init__(self) -> None:
        for name, share in (("keep", self.keep), ("core", self.core)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}")

    def statistics(self, neurons: int) -> tuple[PlaneSpec, ...]:
        """Of how many tokens each neuron was a core neuron."""
        return (PlaneSpec(_COUNTS, "sequence", 1, neurons, "float32"),)

    def kept(self, neurons: int) -> int:
        return math.ceil(self.keep * neurons)

    def observe(
        self, inner: Tensor, statistics: Mapping[str, Tensor], selection: Selection
    ) -> None:
        counts = statistics[_COUNTS]
        core = inner >= selection.strongest(inner, self.core)
        counts += core.sum(0, dtype=counts.dtype)

    def choose(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The most frequent; among equals, the first."""
        [counts] = statistics[_COUNTS]
        order = counts.argsort(descending=True, stable=True)
        chosen: Tensor = order[: self.kept(len(counts))].sort().values
        return chosen
