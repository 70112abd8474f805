"""Plainly right versions of every operation, in torch, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.paged import Attention, PagedPlane, StepShape


def pack_weight(weight: Tensor) -> Tensor:
    """``[out, in]`` weight in the form that ``linear`` takes; here unchanged."""
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[T, in] @ [out, in]^T + [out] -> [T, out]``."""
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` ``[vocab, width]`` for ``ids`` ``[T]``."""
    return F.embedding(ids, table)


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

    ``cos`` and ``sin`` are ``[T, width / 2]``. RoFormer, section 3.2.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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


@dataclass(slots=True)
class ReferencePlan:
    """Slots to write ``[T]``; per row its queries, its context, and the pages that hold it."""

    slots: Tensor
    rows: list[tuple[int, int, Tensor]]


class ReferenceAttention(Attention[ReferencePlan]):
    """Row by row, in fp32, with an explicit mask."""

    def __init__(self, device: str) -> None:
        self._device = device

    def plan(self, shape: StepShape, plane: PagedPlane) -> ReferencePlan:
        rows = []
        for row, (length, past) in enumerate(zip(shape.lengths, shape.past, strict=True)):
            pages = torch.from_numpy(shape.pages(row, past + length, plane))
            rows.append((int(length), int(past + length), pages.to(self._device)))
        return ReferencePlan(torch.from_numpy(shape.slots(plane)).to(self._device), rows)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: PagedPlane,
        values: PagedPlane,
        scale: float,
        plan: ReferencePlan,
    ) -> tuple[Tensor, Tensor]:
        keys.write(plan.slots, k)
        values.write(plan.slots, v)
        outs, lses = [], []
        start = 0
        for length, context, pages in plan.rows:
            key = keys.gather(pages)[:context].float()
            value = values.gather(pages)[:context].float()
            query = q[start : start + length].float()
            out, lse = attend_causally(query, key, value, scale)
            outs.append(out.to(q.dtype))
            lses.append(lse)
            start += length
        return torch.cat(outs), torch.cat(lses)


def attend_causally(q: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The last ``len(q)`` positions of a context attend to everything up to themselves.

    Shapes: q ``[T, heads, width]``, key and value ``[S, kv_heads, width]`` -> ``[T, heads,
    width]`` and ``[T, heads]``.
    """
    length, heads, width = q.shape
    context, kv_heads, _ = key.shape
    grouped = q.view(length, kv_heads, heads // kv_heads, width)
    scores = torch.einsum("tkgd,skd->kgts", grouped, key) * scale
    future = torch.ones(length, context, dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(future.triu(context - length + 1), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    out = torch.einsum("kgts,skd->tkgd", weights, value)
    return out.reshape(length, heads, width), lse.permute(2, 0, 1).reshape(length, heads)
