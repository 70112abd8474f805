"""Steps of paged attention: rows of all kinds, over pages in no order among pages of others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.cache import attention_layout
from headrace.kv.arena import KVArena
from headrace.ops.paged import StepShape

Rows = tuple[tuple[int, int], ...]
"""(queries, past slots) of each row."""

LAYER = 1


@dataclass(frozen=True)
class AttentionCase:
    """One step.

    Args:
        name: what is special about ``rows``.
        heads, kv_heads, width: of the layer.
        spread: of the keys; large ones make single keys decide.
    """

    name: str
    rows: Rows
    heads: int
    kv_heads: int
    width: int
    block_size: int
    dtype: torch.dtype = torch.float32
    spread: float = 1.0

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}-{self.heads}:{self.kv_heads}x{self.width}-block{self.block_size}-{kind}"
        )

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    @cached_property
    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries ``[length, heads, width]`` per row, keys and values ``[context, ...]``."""
        torch.manual_seed(sum(map(ord, str(self))))
        queries = [self._normal(n, self.heads, self.width) for n, _ in self.rows]
        contexts = [n + past for n, past in self.rows]
        keys = [self._normal(n, self.kv_heads, self.width) * self.spread for n in contexts]
        values = [self._normal(n, self.kv_heads, self.width) for n in contexts]
        return queries, keys, values

    def _filled_arena(self, device: str) -> tuple[KVArena, StepShape]:
        """The pages of the rows hold their past, and zeros behind it where the step does not
        write; all others, to which stale parts of the tables point, hold NaN.
        """
        layout = attention_layout(
            layers=3,
            kv_heads=self.kv_heads,
            head_dim=self.width,
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.block_size,
        )
        counts = [layout.pages_for(n + past) for n, past in self.rows]
        arena = KVArena(layout, 2 * sum(counts) + 3, device)
        arena.pages.fill_(math.nan)
        order = np.random.default_rng(0).permutation(len(arena.pages)).astype(np.int32)
        own, others = order[: sum(counts)], order[sum(counts) :]
        arena.blank_pages([int(page) for page in own])
        tables = np.full((len(self.rows), max(counts) + 2), others[0], dtype=np.int32)
        _, keys, values = self.tensors
        for row, pages in enumerate(np.split(own, np.cumsum(counts)[:-1])):
            tables[row, : len(pages)] = pages
            past = self.rows[row][1]
            shape = StepShape(np.array([past]), np.array([0]), tables[row : row + 1])
            for name, entries in (("key", keys[row]), ("value", values[row])):
                plane = arena.plane(LAYER, name)
                if past:
                    slots = torch.from_numpy(shape.slots(plane)).to(device)
                    plane.write(slots, entries[:past].to(device))
        lengths, pasts = (np.array(column) for column in zip(*self.rows, strict=True))
        return arena, StepShape(lengths, pasts, tables)

    def run(self, make: Callable[..., Any], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp, and all that the arena holds afterwards, NaN as 0."""
        arena, shape = self._filled_arena(device)
        attention = make(device, self.dtype)
        queries, keys, values = self.tensors
        new_keys = [k[past:] for k, (_, past) in zip(keys, self.rows, strict=True)]
        new_values = [v[past:] for v, (_, past) in zip(values, self.rows, strict=True)]
        out, log_sum_exp = attention.attend(
            torch.cat(queries).to(device),
            torch.cat(new_keys).to(device),
            torch.cat(new_values).to(device),
            arena.plane(LAYER, "key"),
            arena.plane(LAYER, "value"),
            self.scale,
            attention.plan(shape, arena.group_plane(0)),
        )
        return out.cpu(), log_sum_exp.cpu(), arena.pages.nan_to_num(0.0).cpu()

    def by_definition(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp in fp64, query by query."""
        outs, log_sum_exps = [], []
        for q, k, v, (_, past) in zip(*self.tensors, self.rows, strict=True):
            key, value = (
                x.double().repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v)
            )
            for seen, query in enumerate(q.double(), past + 1):
                scores = (key[:seen] * query).sum(dim=-1) * self.scale
                weights = scores.softmax(dim=0).unsqueeze(-1)
                outs.append((weights * value[:seen]).sum(dim=0))
                log_sum_exps.append(scores.logsumexp(dim=0))
        return torch.stack(outs), torch.stack(log_sum_exps)


def kinds_of_rows(block: int) -> dict[str, Rows]:
    """Rows by what is special about them, around the ends of pages of ``block`` slots."""
    around = sorted({max(0, n) for n in (0, 1, block - 2, block - 1, block, block + 1)})
    return {
        "one token": ((1, 0),),
        "one chunk": ((2 * block + 3, 0),),
        "equal chunks": ((5, 0),) * 3,
        "unequal chunks": ((4, 0), (3, 0), (3, 0), (6, 0)),
        "chunks with a past": tuple((block + 2, past) for past in around),
        "equal chunks, some with a past": ((4, 0), (4, block + 1), (4, block + 1), (4, 0)),
        "equal singles": ((1, block + 2),) * 4,
        "ragged singles": tuple(
            (1, past) for past in (*around, 3 * block - 1, 7 * block, 4 * block, 5)
        ),
        "all kinds": (
            (1, 2 * block - 1),
            (4, 0),
            (1, 0),
            (4, 0),
            (4, block - 2 if block > 2 else 1),
            (1, 7 * block),
            (1, 5 * block - 1),
            (2, 3 * block),
        ),
    }


SHAPES = ((4, 4, 64), (4, 2, 80), (8, 2, 33), (7, 1, 128), (2, 1, 256), (3, 3, 1))
BLOCKS = (1, 3, 16, 32)


def _cases() -> list[AttentionCase]:
    cases = []
    shapes = itertools.cycle(SHAPES)
    for dtype, block in itertools.product((torch.float32, torch.bfloat16), BLOCKS):
        for name, rows in kinds_of_rows(block).items():
            cases.append(AttentionCase(name, rows, *next(shapes), block, dtype))
        # Nine kinds, six shapes: what is next differs from one block size to the other.
    long = ((1, 1_500), (300, 0), (1, 700), (260, 513))
    for dtype in (torch.float32, torch.bfloat16):
        cases.append(AttentionCase("long", long, 4, 2, 64, 16, dtype))
        cases.append(
            AttentionCase("sharp", kinds_of_rows(16)["all kinds"], 4, 2, 64, 16, dtype, 6.0)
        )
    return cases


CASES = _cases()
