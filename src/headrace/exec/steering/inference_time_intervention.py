"""Inference-time intervention: what attention heads say is moved along chosen directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
    vectors: str = ""
    direction: str = ""
    strength: float = 15.0

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("name a file of directions: vectors=FILE")

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """The prompt's last token is moved; those before it are not (section 4.2)."""
        return prompt_tokens - 1

    def open(self, shapes: SiteShapes, ops: Ops) -> Intervention:
        path = Path(self.vectors)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"vectors: {path} cannot be read: {error}") from None
        layers = {
            layer: shape for (site, layer), shape in shapes.items() if site == Intervention.site
        }
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


def fit_direction(outputs: Tensor, labels: Tensor, heads: int) -> Tensor:
    """A direction out of what attention heads say of labelled texts (section 3).

    The heads whose outputs tell the labels best, by linear probes that are fitted to one half and
    scored on the other, are moved from the mean of the false texts to that of the true ones.

    Args:
        outputs: ``[texts, layers, heads, width]`` in fp32; labels: bool ``[texts]``, in any order.
        heads: how many are moved.

    Returns:
        ``[layers, heads, width]``: zero for the other heads, else of the length of one standard
        deviation along it.
    """
    accuracy = probe_accuracy(outputs, labels)
    shift = outputs[labels].mean(0) - outputs[~labels].mean(0)
    unit = torch.nn.functional.normalize(shift, dim=-1)
    deviation = (outputs * unit).sum(-1).std(0)
    chosen = torch.zeros(accuracy.numel(), dtype=torch.bool)
    chosen[accuracy.flatten().topk(heads).indices] = True
    return unit * (deviation * chosen.view_as(deviation))[..., None]


def probe_accuracy(outputs: Tensor, labels: Tensor, steps: int = 300) -> Tensor:
    """How often a logistic probe of each head is right on the half that it is not fitted to."""
    scaled = (outputs - outputs.mean(0)) / outputs.std(0).clamp_min(1e-6)
    targets = labels.float()[:, None, None]
    fitted, tested = slice(0, None, 2), slice(1, None, 2)
    weights = torch.zeros(outputs.shape[1:], requires_grad=True)
    bias = torch.zeros(outputs.shape[1:3], requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.05, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = (scaled[fitted] * weights).sum(-1) + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets[fitted].expand_as(logits)
        )
        (loss * bias.numel()).backward()
        optimizer.step()
    with torch.no_grad():
        logits = (scaled[tested] * weights).sum(-1) + bias
    return ((logits > 0) == (targets[tested] > 0.5)).float().mean(0)
