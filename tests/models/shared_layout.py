"""What workers compute that see each other's caches, slowly: every layout is made explicitly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor


@dataclass
class Block:
    """Keys, not rotated, and values of consecutive tokens: a layer's ``[heads, tokens, width]``."""

    keys: list[Tensor]
    values: list[Tensor]

    def first(self, count: int) -> Block:
        return Block([k[:, :count] for k in self.keys], [v[:, :count] for v in self.values])

    def followed_by(self, other: Block) -> Block:
        return Block(
            [torch.cat(pair, 1) for pair in zip(self.keys, other.keys, strict=True)],
            [torch.cat(pair, 1) for pair in zip(self.values, other.values, strict=True)],
        )

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]


@dataclass
class SharedLayout:
    """A model of transformers that computes one token at a time, each after a layout of blocks."""

    model: Any
    _inner: Any = field(init=False)

    def __post_init__(self) -> None:
        self._inner = self.model.model

    def _turn(self, keys: Tensor, start: int, sign: int) -> Tensor:
        """Rotate ``[heads, tokens, width]`` to positions from ``start`` on, or back."""
        positions = torch.arange(start, start + keys.shape[1])[None]
        cos, sin = self._inner.rotary_emb(keys, positions)
        first, second = keys.chunk(2, dim=-1)
        return keys * cos[0] + sign * torch.cat((-second, first), dim=-1) * sin[0]

    def feed(self, tokens: Sequence[int], before: Sequence[Block]) -> tuple[Tensor, Block]:
        """Logits ``[vocab]`` after the last of ``tokens`` behind ``before``, and their block."""
        cache = transformers.DynamicCache(config=self.model.config)
        past = 0
        if before:
            layout = before[0]
            for block in before[1:]:
                layout = layout.followed_by(block)
            past = layout.length
            for layer, (keys, values) in enumerate(zip(layout.keys, layout.values, strict=True)):
                cache.update(self._turn(keys, 0, 1)[None], values[None], layer)
        positions = torch.arange(past, past + len(tokens))[None]
        with torch.inference_mode():
            logits = self.model(
                torch.tensor([list(tokens)]),
                past_key_values=cache,
                position_ids=positions,
                use_cache=True,
            ).logits
        new = [(each.keys[0, :, past:], each.values[0, :, past:]) for each in cache.layers]
        keys = [self._turn(key, past, -1) for key, _ in new]
        return logits[0, -1].float(), Block(keys, [value for _, value in new])

    def sampled_logits(
        self,
        prompt: Sequence[int],
        headers: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
    ) -> list[Tensor]:
        """Of each worker ``[tokens, vocab]``: from what its outputs should have been drawn.

        Workers go step by step; in each, one sees the prompt, what the next workers had before it,
        in turn, and what it has itself. A worker does not feed its last output.
        """
        count = len(headers)
        after_prompt, shared = self.feed(prompt, [])
        fed = [[*h, *o[:-1]] for h, o in zip(headers, outputs, strict=True)]
        found: list[list[Tensor]] = [[] if h else [after_prompt] for h in headers]
        empty = shared.first(0)
        blocks = [empty] * count
        for step in range(max(map(len, fed))):
            grown = list(blocks)
            for worker in range(count):
                if step >= len(fed[worker]):
                    continue
                others = [blocks[(worker + turn) % count] for turn in range(1, count)]
                layout = [shared, *others, blocks[worker]]
                logits, new = self.feed(fed[worker][step : step + 1], layout)
                grown[worker] = blocks[worker].followed_by(new)
                if step + 1 >= len(headers[worker]):
                    found[worker].append(logits)
            blocks = grown
        return [torch.stack(logits) for logits in found]
