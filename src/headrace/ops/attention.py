"""Paged attention on dense kernels: pages are gathered, rows of a kind attended together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.ops.paged import Attention, PagedPlane, StepShape
from headrace.ops.reference import merge_attention

DenseKernel = Callable[
    [Tensor, Tensor, Tensor, float, "Tensor | None", bool], tuple[Tensor, Tensor]
]
"""(q, k, v, scale, additive mask, causal) -> (out, log-sum-exp); ``[B, heads, T, width]``, with
fewer heads in k and v than in q where queries share them."""

_SCORES_AT_ONCE = 1 << 26
"""Scores that the matmul kernel holds: longer chunks go in parts, so that memory is bounded."""


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
    """Batched matrix products with an explicit softmax between them, on any device."""
    batch, heads, length, _ = q.shape
    count = max(1, _SCORES_AT_ONCE // (batch * heads * k.shape[2]))
    outs, lses = [], []
    for start in range(0, length, count):
        part = q[:, :, start : start + count]
        seen = start + part.shape[2] if causal else k.shape[2]
        scores = _scores(part, k[:, :, :seen]).mul_(scale)
        if mask is not None:
            scores += mask
        if causal:
            future = torch.ones(part.shape[2], seen, dtype=torch.bool, device=q.device)
            scores.masked_fill_(future.triu_(start + 1), -math.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = scores.sub_(lse.unsqueeze(-1)).exp_().to(v.dtype)
        by_kv_head = weights.view(batch, v.shape[1], -1, seen)
        outs.append(torch.matmul(by_kv_head, v[:, :, :seen]).view(*part.shape))
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
        self._seen, self._hidden = torch.tensor([0.0, -math.inf], dtype=dtype, device=device)

    def _tensor(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def plan(self, shape: StepShape, plane: PagedPlane) -> PagedPlan:
        plan = PagedPlan(self._tensor(shape.slots(plane)))
        starts = np.cumsum(shape.lengths) - shape.lengths
        for row in np.flatnonzero(shape.lengths > 1).tolist():
            self._add_chunk(plan.chunks, shape, row, int(starts[row]), plane)
        single = np.flatnonzero(shape.lengths == 1)
        bit_lengths = np.frexp(shape.past[single] // plane.block_size)[1]
        for bits in sorted(set(bit_lengths.tolist())):
            rows = single[bit_lengths == bits]
            plan.singles.append(self._single_queries(shape, rows, starts[rows], plane))
        return plan

    def _add_chunk(
        self, chunks: list[QueryChunks], shape: StepShape, row: int, start: int, plane: PagedPlane
    ) -> None:
        length, past = int(shape.lengths[row]), int(shape.past[row])
        last = chunks[-1] if chunks else None
        if (
            last is not None
            and last.past == past == 0
            and last.length == length
            and last.start + last.count * last.length == start
        ):
            last.count += 1
            return
        pages = self._tensor(shape.pages(row, past, plane)) if past else None
        chunks.append(QueryChunks(start, 1, length, past, pages))

    def _single_queries(
        self,
        shape: StepShape,
        rows: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        plane: PagedPlane,
    ) -> SingleQueries:
        lengths = shape.past[rows] + 1
        longest = int(lengths.max())
        own_last = (lengths - 1) // plane.block_size
        columns = np.minimum(np.arange(own_last.max() + 1), own_last[:, None])
        pages = shape.tables[rows[:, None], columns].astype(np.int64) * plane.stride
        mask = None
        if (lengths != longest).any():
            places = torch.arange(longest, device=self._device)
            own = places < self._tensor(lengths.reshape(-1, 1, 1, 1))
            mask = torch.where(own, self._seen, self._hidden)
        return SingleQueries(self._tensor(starts), self._tensor(pages.reshape(-1)), mask, longest)

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
