"""Paged attention on dense kernels: pages are gathered, rows of a kind attended together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.ops.paged import (
    Attention,
    AttentionSpec,
    Indices,
    LayerCache,
    PagedPlane,
    StepShape,
    quantize_entries,
)
from headrace.ops.reference import merge_attention, rotate

DenseKernel = Callable[
    [Tensor, Tensor, Tensor, AttentionSpec, "Tensor | None", bool], tuple[Tensor, Tensor]
]
"""(q, k, v, spec, additive mask, causal) -> (out, log-sum-exp); ``[B, heads, T, width]``, with
fewer heads in k and v than in q where queries share them. The mask is ``[B, 1, T, S]``; B and T
may be 1. Of the specification, scale and soft cap are read."""

_SCORES_AT_ONCE = 1 << 26
"""Scores that the matmul kernel holds: longer chunks go in parts, so that memory is bounded."""


def flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """FlashAttention on the CPU, through torch; what it does not take goes another way."""
    if spec.softcap is not None or q.shape[-1] != v.shape[-1]:
        return matmul_kernel(q, k, v, spec, mask, causal)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=spec.scale
    )
    return out, lse


def matmul_kernel(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Batched matrix products with an explicit softmax between them, on any device."""
    batch, heads, length, _ = q.shape
    count = max(1, _SCORES_AT_ONCE // (batch * heads * k.shape[2]))
    outs, lses = [], []
    for start in range(0, length, count):
        part = q[:, :, start : start + count]
        seen = start + part.shape[2] if causal else k.shape[2]
        scores = _scores(part, k[:, :, :seen]).mul_(spec.scale)
        if spec.softcap is not None:
            scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        if mask is not None:
            scores += mask[:, :, start : start + count] if mask.shape[2] > 1 else mask
        if causal:
            future = torch.ones(part.shape[2], seen, dtype=torch.bool, device=q.device)
            scores.masked_fill_(future.triu_(start + 1), -math.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = scores.sub_(lse.unsqueeze(-1)).exp_().to(v.dtype)
        by_kv_head = weights.view(batch, v.shape[1], -1, seen)
        out = torch.matmul(by_kv_head, v[:, :, :seen])
        outs.append(out.view(*part.shape[:-1], v.shape[-1]))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """``[B, heads, T, S]`` in fp32: in half precision, scores would be off by too much.

    The queries that share a KV head go through one product.
    """
    batch, heads, length, width = q.shape
    by_kv_head = q.reshape(batch, k.shape[1], -1, width).float()
    return torch.matmul(by_kv_head, k.float().transpose(-1, -2)).view(batch, heads, length, -1)


@dataclass(slots=True)
class SingleQueries:
    """Rows of one query each, attended together.

    Args:
        queries: their places in the step, ``[B]``.
        pages: ``[B * n]``; a row that needs fewer pages than ``n`` repeats its last one.
        mask: ``[B, 1, 1, length]``, 0 or -inf; ``None`` when all see ``length`` slots.
        length: slots of the pages to attend to.
    """

    queries: Tensor
    pages: Tensor
    mask: Tensor | None
    length: int


@dataclass(slots=True)
class Past:
    """What queries of a chunk see of the slots before it.

    Args:
        pages: pages that hold it; ``length``: their slots before the chunk.
        queries: the first so many see some of it.
        mask: ``[1, 1, queries, length]``, 0 or -inf; ``None`` when they see it all.
    """

    pages: Tensor
    length: int
    queries: int
    mask: Tensor | None


@dataclass(slots=True)
class QueryChunks:
    """``count`` consecutive rows of ``length`` queries, the first at place ``start``.

    With a ``past``, there is one row. ``mask`` ``[1, 1, length, length]`` takes the place of
    causality where a window is shorter than the chunk.
    """

    start: int
    count: int
    length: int
    past: Past | None
    mask: Tensor | None


@dataclass(slots=True)
class Arrangement:
    """The rows by kind, for layers of one window; ``whole`` when one batch is everything."""

    singles: list[SingleQueries] = field(default_factory=list)
    chunks: list[QueryChunks] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return len(self.singles) + len(self.chunks) == 1


@dataclass(slots=True)
class PagedPlan:
    """Pages and slots ``[T]`` to write; the arrangement of each window that was asked for, or what
    the rows see of their pasts alone.
    """

    shape: StepShape
    pages: Tensor
    slots: Tensor
    by_window: dict[int | None, Arrangement] = field(default_factory=dict)
    pasts: list[Past] = field(default_factory=list)


class PagedAttention(Attention[PagedPlan]):
    """Attention over pages with a dense kernel, for KV heads that share one page table.

    A chunk attends to its past (gathered, not causal) and to itself (causal, not gathered), and
    the two are merged by their log-sum-exp. Single queries are bucketed by context, so that
    padding at most doubles what is read. With a window, only pages that reach into it are read.
    """

    def __init__(self, kernel: DenseKernel, device: str, dtype: torch.dtype) -> None:
        self._kernel = kernel
        self._device = device
        self._seen, self._hidden = torch.tensor([0.0, -math.inf], dtype=dtype, device=device)

    def _tensor(self, array: Indices) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _mask(self, low: Indices, high: Indices, length: int) -> Tensor:
        """``[B, 1, T, length]``: each of the ``low`` and ``high`` ``[B, T]`` sees between them."""
        place = torch.arange(length, device=self._device)
        first, end = (self._tensor(x)[:, None, :, None] for x in (low, high))
        return torch.where((place >= first) & (place < end), self._seen, self._hidden)

    def plan(self, shape: StepShape, plane: PagedPlane) -> PagedPlan:
        if len(shape.past) > 1:
            raise ValueError("attention on dense kernels takes one page table for all heads")
        pages, slots = map(self._tensor, shape.slots(0, plane.block_size))
        return PagedPlan(shape, pages, slots)

    def _arrange(self, shape: StepShape, size: int, window: int | None) -> Arrangement:
        made = Arrangement()
        starts = np.cumsum(shape.lengths) - shape.lengths
        for row in np.flatnonzero(shape.lengths > 1).tolist():
            self._add_chunk(made.chunks, shape, row, int(starts[row]), size, window)
        single = np.flatnonzero(shape.lengths == 1)
        seen = shape.contexts[0, single]
        seen = seen if window is None else np.minimum(seen, window)
        bit_lengths = np.frexp((seen - 1) // size)[1]
        for bits in sorted(set(bit_lengths.tolist())):
            chosen = bit_lengths == bits
            rows = single[chosen]
            made.singles.append(self._single_queries(shape, rows, seen[chosen], starts, size))
        return made

    def _add_chunk(
        self,
        chunks: list[QueryChunks],
        shape: StepShape,
        row: int,
        start: int,
        size: int,
        window: int | None,
    ) -> None:
        length, past = int(shape.lengths[row]), int(shape.past[0, row])
        last = chunks[-1] if chunks else None
        if (
            last is not None
            and last.past is None
            and past == 0
            and last.length == length
            and last.start + last.count * last.length == start
        ):
            last.count += 1
            return
        query = np.arange(length)
        mask = None
        if window is not None and window < length:
            mask = self._mask(query[None] - window + 1, query[None] + 1, length)
        seen_past = self._past(shape, row, size, window) if past and window != 1 else None
        chunks.append(QueryChunks(start, 1, length, seen_past, mask))

    def _past(self, shape: StepShape, row: int, size: int, window: int | None) -> Past:
        length, past = int(shape.lengths[row]), int(shape.past[0, row])
        if window is None:
            return Past(self._tensor(shape.pages(0, row, 0, past, size)), past, length, None)
        first = max(0, past - window + 1)
        pages = self._tensor(shape.pages(0, row, first, past, size))
        begin = first // size * size
        queries = min(length, window - 1)
        low = np.arange(queries)[None] + (past - window + 1 - begin)
        mask = self._mask(low, np.full_like(low, past - begin), past - begin)
        return Past(pages, past - begin, queries, mask)

    def _single_queries(
        self, shape: StepShape, rows: Indices, seen: Indices, starts: Indices, size: int
    ) -> SingleQueries:
        """``seen``: how many of its last slots each row sees, ``[B]``."""
        contexts = shape.contexts[0, rows]
        first, last = (contexts - seen) // size, (contexts - 1) // size
        columns = first[:, None] + np.arange((last - first).max() + 1)
        pages = shape.tables[0, rows[:, None], np.minimum(columns, last[:, None])]
        end = contexts - first * size
        longest = int(end.max())
        mask = None
        if (seen != longest).any():
            mask = self._mask((end - seen)[:, None], end[:, None], longest)
        pages = pages.astype(np.int64).reshape(-1)
        return SingleQueries(self._tensor(starts[rows]), self._tensor(pages), mask, longest)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        spec: AttentionSpec,
        plan: PagedPlan,
        score_sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if score_sums is not None:
            raise ValueError("attention on dense kernels does not sum scores")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = _store(cache.keys, plan, k)
        width = spec.value_width
        v = _store(cache.values, plan, v) if width is None else k[..., :width]
        if spec.window not in plan.by_window:
            arranged = self._arrange(plan.shape, cache.keys.block_size, spec.window)
            plan.by_window[spec.window] = arranged
        rows = plan.by_window[spec.window]
        if rows.whole and rows.singles:
            return self._attend_singles(q, cache, spec, rows.singles[0])
        if rows.whole:
            return self._attend_chunks(q, k, v, cache, spec, rows.chunks[0])
        out = q.new_empty((*q.shape[:2], v.shape[-1]))
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for single in rows.singles:
            part = self._attend_singles(q[single.queries], cache, spec, single)
            out[single.queries], lse[single.queries] = part
        for chunk in rows.chunks:
            where = slice(chunk.start, chunk.start + chunk.count * chunk.length)
            part = self._attend_chunks(q[where], k[where], v[where], cache, spec, chunk)
            out[where], lse[where] = part
        return out, lse

    def attend_past(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, plan: PagedPlan
    ) -> tuple[Tensor, Tensor]:
        shape, size = plan.shape, cache.keys.block_size
        if not plan.pasts:
            plan.pasts = [self._past(shape, row, size, None) for row in range(len(shape.lengths))]
        outs, lses = [], []
        for queries, past in zip(q.split(shape.lengths.tolist()), plan.pasts, strict=True):
            out, lse = self._attend_past(queries.transpose(0, 1)[None], cache, spec, past)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
        return torch.cat(outs), torch.cat(lses)

    def _attend_past(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, past: Past
    ) -> tuple[Tensor, Tensor]:
        """``[1, heads, queries, width]`` attend to the past of their row."""
        key, value = (
            x[None, :, : past.length] for x in _gather(cache, past.pages, q.dtype, spec.value_width)
        )
        return self._kernel(q, key, value, spec, past.mask, False)

    def _attend_singles(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, rows: SingleQueries
    ) -> tuple[Tensor, Tensor]:
        """Queries that share a KV head become the kernel's query dimension."""
        batch, heads, width = q.shape
        grouped = q.reshape(batch, cache.keys.heads, heads // cache.keys.heads, width)
        key, value = (
            x.view(len(x), batch, -1, x.shape[-1])[:, :, : rows.length].transpose(0, 1)
            for x in _gather(cache, rows.pages, q.dtype, spec.value_width)
        )
        out, lse = self._kernel(grouped, key, value, spec, rows.mask, False)
        return out.reshape(batch, heads, -1), lse.reshape(batch, heads)

    def _attend_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        spec: AttentionSpec,
        rows: QueryChunks,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (
            x.reshape(rows.count, rows.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        causal = spec.causal and rows.mask is None
        out, lse = self._kernel(query, key, value, spec, rows.mask, causal)
        past = rows.past
        if past is not None:
            before = self._attend_past(query[:, :, : past.queries], cache, spec, past)
            merged = merge_attention(out[:, :, : past.queries], lse[:, :, : past.queries], *before)
            if past.queries == rows.length:
                out, lse = merged
            else:
                out[:, :, : past.queries], lse[:, :, : past.queries] = merged
        out = out.transpose(1, 2).reshape(*q.shape[:2], -1)
        return out, lse.transpose(1, 2).reshape(q.shape[:2])


def _store(plane: PagedPlane, plan: PagedPlan, entries: Tensor) -> Tensor:
    """Write the step's ``entries`` ``[T, heads, width]``; returns what reads of them will give."""
    if plane.scales is None:
        plane.joined()[plan.pages, :, plan.slots] = entries
        return entries
    rounded, scales = quantize_entries(entries)
    plane.joined()[plan.pages, :, plan.slots] = rounded
    plane.scales.joined()[plan.pages, :, plan.slots] = scales
    return (rounded * scales).to(entries.dtype)


def _gather(
    cache: LayerCache, pages: Tensor, dtype: torch.dtype, value_width: int | None
) -> list[Tensor]:
    """Keys and values of whole pages in order, ``[heads, len(pages) * block_size, width]``."""
    gathered: list[Tensor] = []
    for plane in (cache.keys, cache.values):
        if gathered and value_width is not None:
            return [*gathered, gathered[0][..., :value_width]]
        # By the first dimension: by another, torch would first copy all pages that there are.
        entries = plane.joined().index_select(0, pages)
        if plane.scales is not None:
            entries = (entries * plane.scales.joined().index_select(0, pages)).to(dtype)
        gathered.append(entries.transpose(0, 1).reshape(plane.heads, -1, plane.width))
    return gathered
