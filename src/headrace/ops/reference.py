"""Plainly right versions of every operation, in torch, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.paged import (
    Attention,
    AttentionSpec,
    Indices,
    LayerCache,
    PagedPlane,
    StepShape,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, computed in fp32.

    Root Mean Square Layer Normalization, section 3.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 * width]`` -> ``[T, width]``.

    GLU Variants Improve Transformer, section 2 (SwiGLU).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` ``[T, heads, width]``, halves as pairs.

    ``cos`` and ``sin`` are ``[T, width / 2]``. Computed in fp32 and rounded once: products of two
    halves are exact there, so that every order of the same sums gives the same bits. RoFormer,
    section 3.2.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys.

    ``out`` is ``[..., width]``, ``lse`` ``[...]`` in fp32. FlashAttention, algorithm 1.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = torch.exp(lse_a - lse).unsqueeze(-1)
    weight_b = torch.exp(lse_b - lse).unsqueeze(-1)
    return (out_a.float() * weight_a + out_b.float() * weight_b).to(out_a.dtype), lse


def merge_parts(
    out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor, owners: Tensor
) -> tuple[Tensor, Tensor]:
    """``merge_attention`` of each of N queries with any number of other parts of its keys.

    Args:
        out: ``[N, heads, width]``; lse: ``[N, heads]`` in fp32.
        outs, lses: of the M other parts, ``[M, ...]``; owners: int64 ``[M]``: whose each is.

    Returns:
        Both in fp32.
    """
    top = lse.scatter_reduce(0, owners[:, None].expand_as(lses), lses, "amax")
    own, others = torch.exp(lse - top), torch.exp(lses - top[owners])
    total = own.index_add(0, owners, others)
    summed = out.float() * own.unsqueeze(-1)
    summed.index_add_(0, owners, outs.float() * others.unsqueeze(-1))
    return summed / total.unsqueeze(-1), top + total.log()


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention ``[T, heads, width]`` as it is with one more key per head that has no value.

    ``sinks`` ``[heads]`` are the scores of those keys, ``lse`` ``[T, heads]`` the log-sum-exp of
    all others (gpt-oss model card, section 2.2; StreamingLLM, section 3.3).
    """
    share = torch.sigmoid(lse - sinks.float())
    return (out.float() * share.unsqueeze(-1)).to(out.dtype)


@dataclass(slots=True)
class ReferencePlan:
    """The shape of the step; per group the pages and slots ``[T]`` to write, and per group and
    row the pages of its context.
    """

    shape: StepShape
    places: list[tuple[Tensor, Tensor]]
    pages: list[list[Tensor]]


class ReferenceAttention(Attention[ReferencePlan]):
    """Row by row and KV head by KV head, in fp32, with an explicit mask."""

    def __init__(self, device: str) -> None:
        self._device = device

    def sums_scores(self, cache: LayerCache) -> bool:
        return True

    def plan(self, shape: StepShape, plane: PagedPlane) -> ReferencePlan:
        size = plane.block_size
        groups, rows = shape.past.shape
        contexts = shape.contexts
        places = [
            (self._tensor(pages), self._tensor(slots))
            for pages, slots in (shape.slots(group, size) for group in range(groups))
        ]
        pages = [
            [
                self._tensor(shape.pages(group, row, 0, int(contexts[group, row]), size))
                for row in range(rows)
            ]
            for group in range(groups)
        ]
        return ReferencePlan(shape, places, pages)

    def _tensor(self, array: Indices) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        spec: AttentionSpec,
        plan: ReferencePlan,
        score_sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape, kv_heads = plan.shape, k.shape[1]
        contexts, score_starts = shape.contexts, shape.score_starts
        query, key = rotate(q, cos, sin).float(), rotate(k, cos, sin)
        by_kv_head = query.view(len(q), kv_heads, -1, q.shape[-1])
        width = spec.value_width or v.shape[-1]
        out = by_kv_head.new_empty((*by_kv_head.shape[:3], width))
        lse = torch.empty(by_kv_head.shape[:3], dtype=torch.float32, device=q.device)
        for head, group in enumerate(shape.head_group.tolist()):
            pages, slots = plan.places[group]
            cache.keys.write(head, pages, slots, key[:, head])
            if spec.value_width is None:
                cache.values.write(head, pages, slots, v[:, head])
            start = 0
            for row, length in enumerate(shape.lengths.tolist()):
                pages, context = plan.pages[group][row], int(contexts[group, row])
                rows = slice(start, start + length)
                # What lies before the window of the first query may be another's by now.
                seen = context if spec.window is None else min(context, length + spec.window - 1)
                passed = context - seen
                page, skipped = divmod(passed, cache.keys.block_size)
                key_seen, value_seen = (
                    plane.read(head, pages[page:])[skipped : skipped + seen]
                    for plane in (cache.keys, cache.values)
                )
                out[rows, head], lse[rows, head], weights = attend_densely(
                    by_kv_head[rows, head], key_seen, value_seen[:, :width], spec
                )
                if score_sums is not None:
                    first = int(score_starts[group, row])
                    score_sums[head, first : first + passed] = 0.0
                    score_sums[head, first + passed : first + context] = weights.sum(dim=(0, 1))
                start += length
        return out.view(*q.shape[:2], -1).to(q.dtype), lse.view(q.shape[:2])

    def attend_past(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, plan: ReferencePlan
    ) -> tuple[Tensor, Tensor]:
        by_kv_head = q.float().view(len(q), cache.keys.heads, -1, q.shape[-1])
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for row, queries in enumerate(by_kv_head.split(plan.shape.lengths.tolist())):
            found = []
            for head, group in enumerate(plan.shape.head_group.tolist()):
                past, pages = int(plan.shape.past[group, row]), plan.pages[group][row]
                keys, values = (x.read(head, pages)[:past] for x in (cache.keys, cache.values))
                # As if heads of one query, which sees everything.
                query = queries[:, head].flatten(0, 1)[None]
                out, lse, _ = attend_densely(query, keys, values[:, : spec.value_width], spec)
                found.append(
                    (out.view(len(queries), -1, out.shape[-1]), lse.view(len(queries), -1))
                )
            outs.append(torch.cat([out for out, _ in found], dim=1))
            lses.append(torch.cat([lse for _, lse in found], dim=1))
        return torch.cat(outs).to(q.dtype), torch.cat(lses)


def attend_densely(
    q: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The last ``len(q)`` positions of a context attend to everything up to themselves.

    Where the specification is not causal, to everything.

    Args:
        q: ``[T, heads, width]``; key, value: ``[S, width]``, shared by all heads.

    Returns:
        ``[T, heads, width of values]``, the log-sum-exp ``[T, heads]``, the probabilities
        ``[T, heads, S]``.
    """
    length, context = len(q), len(key)
    slot = torch.arange(context, device=q.device)
    distance = slot[context - length :, None] - slot
    hidden = (distance < 0) & spec.causal
    if spec.window is not None:
        hidden |= distance >= spec.window
    scores = torch.matmul(q, key.transpose(0, 1)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(hidden.unsqueeze(1), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.matmul(weights, value), lse, weights
