"""Paged attention on dense kernels: pages are gathered, rows of a kind attended together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.ops.paged import Attention, PagedPlane, RowShape, slot_rows
from headrace.ops.reference import merge_attention

DenseKernel = Callable[[Tensor, Tensor, Tensor, float, "Tensor | None", bool], tuple[Tensor, Tensor]]
"""(q, k, v, scale, additive mask, causal) -> (out, log-sum-exp); ``[B, heads, T, width]``, with
fewer heads in k and v than in q where queries share them."""


def flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """FlashAttention on the CPU, through torch."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def matmul_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Two batched matrix products with an explicit softmax between them, on any device."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.matmul(weights.to(v.dtype), v), lse


@dataclass(slots=True)
class SingleQueries:
    """Rows of one query each, attended together.

    Args:
        queries: their places in the step, ``[B]``.
        pages: ``[B * n]``; a row that needs fewer pages than ``n`` repeats its last one.
        mask: ``[B, 1, 1, length]``, 0 or -inf; ``None`` when all contexts are ``length`` long.
        length: slots to attend to.
    """

    queries: Tensor
    pages: Tensor
    mask: Tensor | None
    length: int


@dataclass(slots=True)
class QueryChunks:
    """``count`` consecutive rows of ``length`` queries, the first at place ``start``.

    With a ``past``, there is one row, and ``pages`` hold its past.
    """

    start: int
    count: int
    length: int
    past: int
    pages: Tensor | None


@dataclass(slots=True)
class PagedPlan:
    """``slots`` ``[T]`` to write, and the rows by kind; ``whole`` when one batch is everything."""

    slots: Tensor
    singles: list[SingleQueries] = field(default_factory=list)
    chunks: list[QueryChunks] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return len(self.singles) + len(self.chunks) == 1


class PagedAttention(Attention[PagedPlan]):
    """Attention over pages with a dense kernel.

    A chunk attends to its past (gathered, not causal) and to itself (causal, not gathered), and
    the two are merged by their log-sum-exp. Single queries are bucketed by context, so that
    padding at most doubles what is read.
    """

    def __init__(self, kernel: DenseKernel, device: str, dtype: torch.dtype) -> None:
        self._kernel = kernel
        self._device = device
        self._dtype = dtype

    def _tensor(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def plan(self, rows: Sequence[RowShape], plane: PagedPlane) -> PagedPlan:
        plan = PagedPlan(self._tensor(slot_rows(rows, plane)))
        buckets: dict[int, list[tuple[int, RowShape]]] = {}
        start = 0
        for row in rows:
            if row.length == 1:
                bucket = (row.past // plane.block_size).bit_length()
                buckets.setdefault(bucket, []).append((start, row))
            else:
                self._add_chunk(plan.chunks, row, start, plane)
            start += row.length
        plan.singles = [self._single_queries(bucket, plane) for bucket in buckets.values()]
        return plan

    def _add_chunk(
        self, chunks: list[QueryChunks], row: RowShape, start: int, plane: PagedPlane
    ) -> None:
        last = chunks[-1] if chunks else None
        if (
            last is not None
            and last.past == row.past == 0
            and last.length == row.length
            and last.start + last.count * last.length == start
        ):
            last.count += 1
            return
        pages = self._tensor(row.pages(row.past, plane)) if row.past else None
        chunks.append(QueryChunks(start, 1, row.length, row.past, pages))

    def _single_queries(
        self, bucket: list[tuple[int, RowShape]], plane: PagedPlane
    ) -> SingleQueries:
        lengths = np.array([row.past + 1 for _, row in bucket])
        longest = int(lengths.max())
        count = -(-longest // plane.block_size)
        pages = np.empty((len(bucket), count), dtype=np.int64)
        for index, (_, row) in enumerate(bucket):
            own = row.pages(row.past + 1, plane)
            pages[index, : len(own)] = own
            pages[index, len(own) :] = own[-1]
        mask = None
        if (lengths != longest).any():
            beyond = np.arange(longest)[None, :] >= lengths[:, None]
            zeros = torch.zeros(len(bucket), 1, 1, longest, dtype=self._dtype)
            mask = zeros.masked_fill_(torch.from_numpy(beyond)[:, None, None], -math.inf)
            mask = mask.to(self._device, non_blocking=True)
        queries = self._tensor(np.array([place for place, _ in bucket]))
        return SingleQueries(queries, self._tensor(pages.reshape(-1)), mask, longest)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: PagedPlane,
        values: PagedPlane,
        scale: float,
        plan: PagedPlan,
    ) -> tuple[Tensor, Tensor]:
        keys.write(plan.slots, k)
        values.write(plan.slots, v)
        if plan.whole and plan.singles:
            return self._attend_singles(q, keys, values, scale, plan.singles[0])
        if plan.whole:
            return self._attend_chunks(q, k, v, keys, values, scale, plan.chunks[0])
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for single in plan.singles:
            part = self._attend_singles(q[single.queries], keys, values, scale, single)
            out[single.queries], lse[single.queries] = part
        for chunk in plan.chunks:
            where = slice(chunk.start, chunk.start + chunk.count * chunk.length)
            part = self._attend_chunks(q[where], k[where], v[where], keys, values, scale, chunk)
            out[where], lse[where] = part
        return out, lse

    def _attend_singles(
        self, q: Tensor, keys: PagedPlane, values: PagedPlane, scale: float, rows: SingleQueries
    ) -> tuple[Tensor, Tensor]:
        """Queries that share a KV head become the kernel's query dimension."""
        batch, heads, width = q.shape
        grouped = q.reshape(batch, keys.heads, heads // keys.heads, width)
        key, value = (
            plane.gather(rows.pages)
            .view(batch, -1, plane.heads, plane.width)[:, : rows.length]
            .transpose(1, 2)
            for plane in (keys, values)
        )
        out, lse = self._kernel(grouped, key, value, scale, rows.mask, False)
        return out.reshape(batch, heads, width), lse.reshape(batch, heads)

    def _attend_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: PagedPlane,
        values: PagedPlane,
        scale: float,
        rows: QueryChunks,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (
            x.reshape(rows.count, rows.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        out, lse = self._kernel(query, key, value, scale, None, True)
        if rows.pages is not None:
            past_key, past_value = (
                plane.gather(rows.pages)[None, : rows.past].transpose(1, 2)
                for plane in (keys, values)
            )
            before = self._kernel(query, past_key, past_value, scale, None, False)
            out, lse = merge_attention(out, lse, *before)
        return out.transpose(1, 2).reshape(q.shape), lse.transpose(1, 2).reshape(q.shape[:2])
