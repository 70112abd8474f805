"""Early exits: heads behind chosen layers, trained to say what the model itself says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from headrace.contracts.method import MethodCard
from headrace.exec.depth import DepthMethod, ExitParts, Exits, Head

CONFIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": lambda p: p.amax(-1),
    "margin": lambda p: p.topk(2).values.diff().abs()[..., 0],
    "entropy": lambda p: 1 - torch.special.entr(p).sum(-1) / math.log(p.shape[-1]),
}
"""How sure probabilities ``[..., vocab]`` are, from 0 to 1: the highest; how far it is above the
second; how far their entropy is below that of chance."""


@dataclass(frozen=True, slots=True)
class EarlyExit(DepthMethod):
    """Draw a token from the head of an exit that is sure enough of it.

    A head is the model's own, behind a linear map of the residual stream if there is a file of
    them. Unlike in the paper, layers left out are made up for when the sequence goes on.

    Args:
        layers: before which rows may leave, as in 4+8: ascending, the first layer being 0.
        threshold: how sure a head must be; above 1, none ever is.
        confidence: how that is measured: probability, margin or entropy.
        defer: tokens of a sequence that wait at most until it goes through all layers.
        heads: safetensors file made of what ``fit_exit`` finds for each exit, ``4.weight`` and
            ``4.bias``; empty: the residual stream goes into the model's head as it is.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="Accelerating Large Language Model Inference with Self-Supervised Early Exits",
        summary="Draws tokens from heads behind some of the layers, where these are sure enough.",
        guarantee="lossy",
        request_options=("threshold",),
    )
    layers: str = ""
    threshold: float = 0.9
    confidence: str = "probability"
    defer: int = 7
    heads: str = ""

    def __post_init__(self) -> None:
        named = self.layers.split("+")
        if not all(name.isdecimal() for name in named):
            raise ValueError(f"layers: name those to leave before, as in 4+8; got {self.layers!r}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")
        if self.confidence not in CONFIDENCE:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCE)}")
        if self.defer < 1:
            raise ValueError(f"defer must be at least 1, got {self.defer}")

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(int(name) for name in self.layers.split("+"))

    @property
    def most_waiting(self) -> int:
        return self.defer

    def open(self, parts: ExitParts) -> ExitHeads:
        if not self.heads:
            return ExitHeads({})
        try:
            found = load_file(self.heads)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"heads: {self.heads} cannot be read: {error}") from None
        maps = {}
        for exit in self.exits:
            shapes = {f"{exit}.weight": [parts.hidden] * 2, f"{exit}.bias": [parts.hidden]}
            for name, shape in shapes.items():
                got = list(found[name].shape) if name in found else "none"
                if got != shape:
                    raise ValueError(f"heads: {name} must be {shape}, {self.heads} has {got}")
            weight, bias = (found[name].to(parts.ops.device, parts.ops.dtype) for name in shapes)
            maps[exit] = weight, bias
        return ExitHeads(maps)


class ExitHeads(Exits[EarlyExit]):
    """Linear maps in memory: exit -> weight and bias of what is added to the residual stream."""

    def __init__(self, maps: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._maps = maps

    def answer(
        self, layer: int, hidden: Tensor, methods: Sequence[EarlyExit], head: Head
    ) -> tuple[Tensor, Tensor]:
        if layer in self._maps:
            weight, bias = self._maps[layer]
            added = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
            hidden = hidden + added.to(hidden.dtype)
        logits = head(hidden)
        sure = CONFIDENCE[methods[0].confidence](logits.float().softmax(-1))
        thresholds = torch.tensor([method.threshold for method in methods], device=sure.device)
        return sure >= thresholds, logits


def fit_exit(at_exit: Tensor, at_end: Tensor, ridge: float = 1e-3) -> dict[str, Tensor]:
    """The linear map from what passes an exit to what leaves the last layer, by ridge regression.

    It learns from the model's own results on any text, as the paper's heads do by gradients.

    Args:
        at_exit, at_end: the residual stream of the same tokens, ``[n, hidden]``.
        ridge: penalty, in mean squares of what passes.

    Returns:
        "weight" ``[hidden, hidden]`` and "bias" ``[hidden]``, fp32: what is added.
    """
    known, missing = at_exit.double(), (at_end - at_exit).double()
    mean, shift = known.mean(0), missing.mean(0)
    centred = known - mean
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    weight = torch.linalg.solve(gram, centred.T @ (missing - shift)).T
    return {"weight": weight.float().contiguous(), "bias": (shift - weight @ mean).float()}


def calibrate(confidences: Tensor, agrees: Tensor, target: float) -> float:
    """The lowest threshold above which a head agrees with the model often enough; or infinity.

    Args:
        confidences: of a head for tokens of a calibration set, ``[n]``.
        agrees: bool ``[n]``: whether its likeliest token is the model's.
        target: share of the tokens that leave for which it must be.
    """
    ranked, order = confidences.double().sort(descending=True)
    shares = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    # Of tokens with the same confidence, all leave or none: only behind the last is a cut.
    ends = torch.cat((ranked[1:] < ranked[:-1], torch.tensor([True])))
    found = ranked[ends & (shares >= target)]
    return float(found[-1]) if len(found) else math.inf
