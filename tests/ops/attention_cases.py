"""Steps of paged attention: rows of all kinds, over pages in no order among pages of others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.contracts.cache import attention_layout
from headrace.kv.arena import KVArena
from headrace.ops.paged import AttentionSpec, LayerCache, PagedPlane, StepShape
from headrace.ops.reference import rotate

Rows = tuple[tuple[int, int], ...]
"""(queries, past slots) of each row."""

LAYER = 1
NAN_BYTE = 255
"""Halves and floats of such bytes are NaN."""
UNTOUCHED = -5.0


@dataclass(frozen=True)
class Outcome:
    """``sums`` are the score sums, if asked for; ``pages`` what the arena holds afterwards."""

    out: Tensor
    log_sum_exp: Tensor
    sums: Tensor | None
    pages: Tensor

    def assert_close(self, expected: Outcome, allowed: dict[str, float], error: float) -> None:
        """``allowed``: of the output; ``error``: of the log-sum-exp. Pages must be the same."""
        assert self.out.dtype == expected.out.dtype and self.log_sum_exp.dtype == torch.float32
        torch.testing.assert_close(self.out, expected.out, **allowed)
        torch.testing.assert_close(self.log_sum_exp, expected.log_sum_exp, rtol=1e-5, atol=error)
        assert torch.equal(self.pages, expected.pages)


@dataclass(frozen=True)
class AttentionCase:
    """One step.

    Args:
        name: what is special about ``rows``.
        heads, kv_heads, width: of the layer.
        spread: of the keys; large ones make single keys decide.
        cache: element type of the planes; that of the queries if empty.
        groups: of KV heads, each with a past of its own: a slot fewer than the group before.
            With several, the heads of a page lie in no order.
    """

    name: str
    rows: Rows
    heads: int
    kv_heads: int
    width: int
    block_size: int
    dtype: torch.dtype = torch.float32
    spread: float = 1.0
    cache: str = ""
    window: int | None = None
    groups: int = 1

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        shape = f"{self.heads}:{self.kv_heads}x{self.width}"
        parts = [self.name, shape, f"block{self.block_size}", kind, self.cache]
        parts += [f"window{self.window}"] if self.window else []
        parts += [f"groups{self.groups}"] if self.groups > 1 else []
        return "-".join(part for part in parts if part)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.width**-0.5, self.window)

    @cached_property
    def past(self) -> np.ndarray:
        """``[G, R]``."""
        pasts = np.array([past for _, past in self.rows])
        return np.stack([np.maximum(pasts - group, 0) for group in range(self.groups)])

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([length for length, _ in self.rows])

    @cached_property
    def head_group(self) -> np.ndarray:
        return np.arange(self.kv_heads)[::-1] % self.groups

    @cached_property
    def qkv(self) -> Tensor:
        """``[T, heads + 2 * kv_heads, width]``: queries, new keys and values in one buffer."""
        torch.manual_seed(sum(map(ord, str(self))))
        wide = torch.randn(int(self.lengths.sum()), self.heads + 2 * self.kv_heads, self.width)
        wide[:, self.heads : -self.kv_heads] *= self.spread
        return wide.to(self.dtype)

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(len(self.qkv))
        angles = torch.rand(len(self.qkv), self.width // 2) * 100
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    @cached_property
    def pasts(self) -> list[tuple[Tensor, Tensor]]:
        """Per row, keys (rotated) and values ``[past of the first group, kv_heads, width]``."""
        torch.manual_seed(sum(map(ord, str(self))) + 1)
        sizes = [(past, self.kv_heads, self.width) for _, past in self.rows]
        return [
            (
                (torch.randn(size) * self.spread).to(self.dtype),
                torch.randn(size).to(self.dtype),
            )
            for size in sizes
        ]

    def _shuffled(self, plane: PagedPlane, order: list[int]) -> PagedPlane:
        scales = plane.scales and self._shuffled(plane.scales, order)
        offsets = tuple(plane.offsets[head] for head in order)
        return PagedPlane(plane.pages, offsets, plane.block_size, plane.width, plane.dtype, scales)

    def _layer(self, arena: KVArena) -> LayerCache:
        cache = arena.cache(LAYER)
        if self.groups == 1:
            return cache
        order = np.random.default_rng(1).permutation(self.kv_heads).tolist()
        return LayerCache(self._shuffled(cache.keys, order), self._shuffled(cache.values, order))

    def _filled(self, device: str, blank: bool) -> tuple[Tensor, LayerCache, StepShape]:
        """The pages of the rows hold their past; where the step does not write, what follows is
        NaN, or zeros if ``blank``. All others, to which stale parts of tables point, hold NaN.
        """
        layout = attention_layout(
            layers=3,
            kv_heads=self.kv_heads,
            head_dim=self.width,
            dtype=self.cache or str(self.dtype).removeprefix("torch."),
            block_size=self.block_size,
        )
        contexts = (self.past + self.lengths).ravel()
        counts = [layout.pages_for(int(context)) for context in contexts]
        arena = KVArena(layout, 2 * sum(counts) + 3, device)
        arena.pages.fill_(NAN_BYTE)
        order = np.random.default_rng(0).permutation(len(arena.pages)).astype(np.int32)
        own, others = order[: sum(counts)], order[sum(counts) :]
        if blank:
            arena.blank_pages([int(page) for page in own])
        tables = np.full((len(counts), max(counts) + 2), others[0], dtype=np.int32)
        for row, pages in enumerate(np.split(own, np.cumsum(counts)[:-1])):
            tables[row, : len(pages)] = pages
        tables = tables.reshape(self.groups, len(self.rows), -1)
        cache = self._layer(arena)
        for (head, group), (row, entries) in itertools.product(
            enumerate(self.head_group), enumerate(self.pasts)
        ):
            past = int(self.past[group, row])
            page, slot = np.divmod(np.arange(past), self.block_size)
            places = (
                torch.from_numpy(tables[group, row, page].astype(np.int64)).to(device),
                torch.from_numpy(slot).to(device),
            )
            for plane, written in zip((cache.keys, cache.values), entries, strict=True):
                plane.write(head, *places, written[:past, head].to(device))
        return arena.pages, cache, StepShape(self.lengths, self.past, tables, self.head_group)

    def run(
        self,
        make: Callable[..., Any],
        device: str = "cpu",
        *,
        blank: bool = True,
        sums: bool = False,
    ) -> Outcome:
        """Execute the step by one version."""
        pages, cache, shape = self._filled(device, blank)
        attention = make(device, self.dtype)
        # Parts of one buffer, as a projection leaves them.
        q, k, v = self.qkv.to(device).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        cos, sin = (x.to(device) for x in self.angles)
        score_sums = None
        if sums:
            slots = int(shape.contexts.sum(axis=1).max()) + 1
            score_sums = torch.full((self.kv_heads, slots), UNTOUCHED, device=device)
        plan = attention.plan(shape, cache.keys)
        out, lse = attention.attend(q, k, v, cos, sin, cache, self.spec, plan, score_sums)
        if score_sums is not None:
            score_sums = score_sums.cpu()
        return Outcome(out.cpu(), lse.cpu(), score_sums, pages.cpu())

    @property
    def behind_a_past(self) -> AttentionCase | None:
        """Those rows of a step without windows and groups that have a past, if there are any."""
        rows = tuple(row for row in self.rows if row[1])
        whole = self.window is None and self.groups == 1
        return dataclasses.replace(self, rows=rows) if rows and whole else None

    def read_past(self, make: Callable[..., Any], device: str = "cpu") -> Outcome:
        """What the queries find in their rows' past alone."""
        pages, cache, shape = self._filled(device, blank=True)
        attention = make(device, self.dtype)
        q = rotate(self.qkv[:, : self.heads].to(device), *(x.to(device) for x in self.angles))
        before = pages.clone()
        plan = attention.plan(shape, cache.keys)
        out, lse = attention.attend_past(q, cache, self.spec, plan)
        assert torch.equal(pages, before), "something was written"
        return Outcome(out.cpu(), lse.cpu(), None, pages.cpu())

    def past_by_definition(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of ``read_past`` in fp64, row by row."""
        q = turn(self.qkv[:, : self.heads].double(), *self.angles)
        outs, lses = [], []
        ratio = self.heads // self.kv_heads
        for queries, (keys, values) in zip(q.split(self.lengths.tolist()), self.pasts, strict=True):
            key, value = (x.double().repeat_interleave(ratio, 1) for x in (keys, values))
            scores = torch.einsum("thw,shw->ths", queries, key) * self.spec.scale
            outs.append(torch.einsum("ths,shw->thw", scores.softmax(-1), value))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses)

    def by_definition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp and score sums in fp64, query by query."""
        q, k, v = self.qkv.double().split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = (turn(x, *self.angles) for x in (q, k))
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float64)
        contexts = self.past + self.lengths
        sums = torch.full((self.kv_heads, int(contexts.sum(1).max()) + 1), UNTOUCHED).double()
        ratio = self.heads // self.kv_heads
        for head, group in enumerate(self.head_group):
            place = start = 0
            for row, (length, _) in enumerate(self.rows):
                past, context = int(self.past[group, row]), int(contexts[group, row])
                keys, values = (
                    torch.cat((old[:past, head].double(), new[start : start + length, head]))
                    for old, new in zip(self.pasts[row], (k, v), strict=True)
                )
                total = torch.zeros(context, dtype=torch.float64)
                for i, h in itertools.product(
                    range(length), range(head * ratio, (head + 1) * ratio)
                ):
                    end = past + i + 1
                    first = 0 if self.window is None else max(0, end - self.window)
                    scores = keys[first:end] @ q[start + i, h] * self.spec.scale
                    weights = scores.softmax(dim=0)
                    out[start + i, h] = weights @ values[first:end]
                    lse[start + i, h] = scores.logsumexp(dim=0)
                    total[first:end] += weights
                sums[head, place : place + context] = total
                place, start = place + context, start + length
        return out, lse, sums


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of halves as complex numbers, turned by their angles."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


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


SHAPES = ((4, 4, 64), (4, 2, 80), (8, 2, 34), (7, 1, 128), (2, 1, 256), (3, 3, 2))
BLOCKS = (1, 3, 16, 32)
WINDOWS = (1, 2, 17, 40)
LONG: Rows = ((1, 1_500), (300, 0), (1, 700), (260, 513))


def _dense_cases() -> list[AttentionCase]:
    """For every version and both dtypes."""
    cases = []
    shapes = itertools.cycle(SHAPES)
    windows = itertools.cycle(WINDOWS)
    for dtype, block in itertools.product((torch.float32, torch.bfloat16), BLOCKS):
        for name, rows in kinds_of_rows(block).items():
            shape = next(shapes)
            cases.append(AttentionCase(name, rows, *shape, block, dtype))
            if block in (3, 16):
                window = next(windows)
                cases.append(AttentionCase(name, rows, *shape, block, dtype, window=window))
                cases.append(AttentionCase(name, rows, *shape, block, dtype, cache="int8"))
        # Nine kinds, six shapes: what is next differs from one block size to the other.
    for dtype in (torch.float32, torch.bfloat16):
        cases.append(AttentionCase("long", LONG, 4, 2, 64, 16, dtype))
        cases.append(AttentionCase("long", LONG, 4, 2, 64, 16, dtype, window=350))
        cases.append(
            AttentionCase("sharp", kinds_of_rows(16)["all kinds"], 4, 2, 64, 16, dtype, 6.0)
        )
    return cases


RATIOS = ((2, 2), (4, 2), (4, 1), (14, 2), (8, 1))
WIDTHS = (64, 80, 96, 128, 256)


def _native_cases() -> list[AttentionCase]:
    """Halves, over the head sizes, ratios and page sizes of models."""
    half = torch.bfloat16
    cases = []
    mixed: Rows = (*((1 + 7 * i % 23, 31 * i % 97) for i in range(9)), (1, 200), (70, 5))
    singles: Rows = tuple((1, 13 * i % 300) for i in range(70))
    kinds = itertools.cycle(
        (("mixed", mixed), ("singles", singles), ("prefill", ((67, 0), (129, 64))))
    )
    for (heads, kv_heads), width, block in itertools.product(RATIOS, WIDTHS, (8, 16, 32)):
        name, rows = next(kinds)
        options: dict[str, Any] = {"cache": "int8"} if (width // 16 + block // 8) % 2 else {}
        shape = heads, kv_heads, width, block, half
        cases.append(AttentionCase(name, rows, *shape, **options))
        if width in (64, 96):
            cases.append(AttentionCase(name, rows, *shape, **options, window=width // 2 + 5))
        if kv_heads == 2 and width != 256:
            cases.append(AttentionCase(name, rows, *shape, **options, groups=2))
    for cache in ("", "int8"):
        alone: Rows = ((1, 4_321),)
        cases.append(AttentionCase("alone", alone, 8, 2, 64, 16, half, cache=cache))
        cases.append(AttentionCase("alone", alone, 8, 2, 64, 16, half, cache=cache, window=900))
        cases.append(AttentionCase("alone", alone, 8, 2, 64, 16, half, 8.0, cache))
        cases.append(AttentionCase("two", ((1, 2_000), (2, 33)), 7, 1, 128, 16, half, cache=cache))
        cases.append(AttentionCase("odd", mixed, 6, 2, 34, 3, half, cache=cache))
        cases.append(AttentionCase("tiny", mixed, 3, 3, 2, 1, half, cache=cache))
    return cases


CASES = _dense_cases()
NATIVE_CASES = [case for case in CASES if case.dtype == torch.bfloat16] + _native_cases()
GROUPED_CASES = [
    AttentionCase(name, rows, 4, 2, 16, 4, dtype, cache=cache, groups=groups)
    for name, rows in kinds_of_rows(4).items()
    for dtype, cache, groups in ((torch.float32, "", 2), (torch.float32, "", 1))
]
