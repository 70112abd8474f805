"""SlimInfer: blocks of the prompt that matter little do not go on to later layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headrace.contracts.method import MethodCard
from headrace.contracts.token_pruning import TokenPruningMethod


@dataclass(frozen=True, slots=True)
class SlimInfer(TokenPruningMethod):
    """Before some layers, keep the blocks that the prompt's last tokens attend to ("Dynamic
    Block-wise Pruning").

    A block's score is that of the best of its units, and a unit's the mean attention that its
    tokens got, in the layer before, from all heads of the last ``block`` tokens. The first block of
    the prompt, and the last one with what follows it, always stay. A prompt longer than ``span``
    is read, and pruned, part by part; in the paper, all of it at once.

    Args:
        layers: before which blocks are dropped, as in 0.3+0.6 of the depth, or by number as in
            10+20: ascending, the first layer being 0. Pages are best filled where the layers
            between two such points are as many everywhere, or a multiple.
        keep: share of a part's blocks that go on from each, as in 0.5+0.25.
        span: tokens of a part.
        block: tokens that stay or go together.
        unit: tokens of a block that are scored together.
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="SlimInfer: Accelerating Long-Context LLM Inference via Dynamic Token Pruning",
        summary="Drops blocks of the prompt before later layers, by the attention of its end.",
        guarantee="lossy",
        request_options=("keep",),
    )
    layers: str = "0.25+0.75"
    keep: str = "0.5+0.25"
    span: int = 448
    block: int = 64
    unit: int = 16

    def __post_init__(self) -> None:
        for name in ("layers", "keep"):
            try:
                found = [float(each) for each in getattr(self, name).split("+")]
            except ValueError:
                found = [math.nan]
            if not all(0 <= each < math.inf for each in found):
                raise ValueError(f"{name}: give numbers, as in 0.5+0.25; got {getattr(self, name)}")
        for each in self.layers.split("+"):
            if not each.isdecimal() and float(each) > 1:
                raise ValueError(f"layers: give shares of at most 1, or whole numbers; got {each}")
        if len(self.shares) != len(self.layers.split("+")):
            raise ValueError(f"keep: give a share for each of the layers {self.layers}")
        descending = list(self.shares) == sorted(self.shares, reverse=True)
        if not descending or self.shares[0] > 1 or self.shares[-1] == 0:
            raise ValueError(f"keep: shares must descend from at most 1, above 0; got {self.keep}")
        if self.block < 1 or self.unit < 1 or self.block % self.unit:
            raise ValueError(f"block must be a multiple of unit, got {self.block} and {self.unit}")
        if self.span < 1 or self.span % self.block:
            raise ValueError(f"span must be a multiple of block, got {self.span} and {self.block}")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the blocks that each stage has."""
        return tuple(float(each) for each in self.keep.split("+"))

    @property
    def part_tokens(self) -> int:
        return self.span

    @property
    def window(self) -> int:
        return self.block

    def begins(self, layers: int) -> tuple[int, ...]:
        return tuple(
            int(each) if each.isdecimal() else round(float(each) * layers)
            for each in self.layers.split("+")
        )

    def left(self, stage: int, tokens: int) -> int:
        blocks = tokens // self.block
        kept = max(2, math.ceil(blocks * self.shares[stage - 1]))
        return tokens - max(0, blocks - kept) * self.block

    def choose(self, weights: Tensor, count: int, first: bool) -> Tensor:
        tokens = weights.shape[-1]
        blocks, kept = tokens // self.block, count // self.block
        means = weights[..., : blocks * self.block].mean(dim=(0, 1, 2))
        # Not a number would rank above what always stays: the last token has to fail of it.
        scores = means.view(blocks, -1, self.unit).mean(-1).amax(-1).nan_to_num()
        scores[-1] = math.inf
        if first:
            scores[0] = math.inf
        best = scores.argsort(descending=True, stable=True)[:kept].sort().values
        places = torch.arange(tokens, device=weights.device)
        inner = places[: blocks * self.block].view(blocks, self.block)[best].flatten()
        return torch.cat((inner, places[blocks * self.block :]))
