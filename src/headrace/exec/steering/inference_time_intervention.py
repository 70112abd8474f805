"""Inference-time intervention: what attention heads say is moved along chosen directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from headrace.contracts.method import MethodCard
from headrace.exec.taps import Site, SiteShapes, Tap, TapMethod, TappedRows
from headrace.ops.table import Ops


@dataclass(frozen=True, slots=True)
class InferenceTimeIntervention(TapMethod):
    """Add ``strength`` x direction to the heads' outputs wherever a token is drawn from.

    Args:
        vectors: safetensors file of directions, ``[layers, heads, width]`` each: zero for heads
            that are left alone, else of the length of one standard deviation along it.
        direction: its tensor's name; may be left out where the file has one.
        strength: standard deviations to move by.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="Inference-Time Intervention: Eliciting Truthful Answers from a Language Model",
        summary="Moves the outputs of chosen attention heads along directions, for each request.",
        guarantee="lossy",
        request_options=("direction", "strength"),
    )
    site: ClassVar[Site] = "attention"

    vectors: str = ""
    direction: str = ""
    strength: float = 15.0

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("name a file of directions: vectors=FILE")

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """The prompt's last token is moved; those before it are not (section 4.2)."""
        return prompt_tokens - 1

    def open(self, shapes: SiteShapes, ops: Ops) -> Tap[Any]:
        path = Path(self.vectors)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"vectors: {path} cannot be read: {error}") from None
        layers = {layer: shape for (site, layer), shape in shapes.items() if site == self.site}
        for name, tensor in found.items():
            for layer, shape in layers.items():
                if layer >= len(tensor) or tuple(tensor[layer].shape) != shape:
                    raise ValueError(
                        f"vectors: {name} is {list(tensor.shape)}; layer {layer} of the model has "
                        f"heads of {list(shape)}"
                    )
        tap = Intervention({k: v.to(ops.device, torch.float32) for k, v in found.items()})
        tap.check(self)
        return tap


class Intervention(Tap[InferenceTimeIntervention]):
    """Directions in memory."""

    site: Site = "attention"

    def __init__(self, directions: dict[str, Tensor]) -> None:
        self._directions = directions
        self._moved = {
            name: tensor.flatten(1).any(1).tolist() for name, tensor in directions.items()
        }

    def _name(self, method: InferenceTimeIntervention) -> str:
        return method.direction or next(iter(self._directions))

    def check(self, method: InferenceTimeIntervention) -> None:
        known = ", ".join(self._directions)
        if not method.direction and len(self._directions) > 1:
            raise ValueError(f"direction: choose one of {known}")
        if self._name(method) not in self._directions:
            raise ValueError(f"direction: {method.direction!r} is unknown; known: {known}")

    def __call__(
        self,
        layer: int,
        values: Tensor,
        rows: Sequence[TappedRows[InferenceTimeIntervention]],
    ) -> Tensor:
        for row in rows:
            name = self._name(row.method)
            if self._moved[name][layer]:
                added = self._directions[name][layer] * row.method.strength
                values[row.answering] += added.to(values.dtype)
        return values
