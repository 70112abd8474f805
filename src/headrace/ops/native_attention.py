"""Attention over pages on the native kernels, for bfloat16 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from headrace.ops.extension import extension
from headrace.ops.paged import Attention, AttentionSpec, LayerCache, PagedPlane, StepShape

if TYPE_CHECKING:
    from headrace.ops import _native


MOST_WIDTH = 256
"""Of a head."""


@dataclass(slots=True)
class NativePlan:
    """The rows of a step, as kernels know them and as they came."""

    rows: _native.StepRows
    tokens: int
    shape: StepShape

    @property
    def score_slots(self) -> int:
        """How many slots the score sums of a KV head take."""
        return int(self.shape.contexts.sum(axis=1).max())


class NativeAttention(Attention[NativePlan]):
    """FlashAttention over pages, in bfloat16, for caches of bfloat16 or int8.

    Takes what ``Attention`` takes: KV heads in groups, windows, soft caps, score sums. Values must
    be a plane of their own, as wide as the keys.

    Args:
        context: kernels and threads.
    """

    def __init__(self, context: _native.Context) -> None:
        module = extension()
        assert module is not None, "a context comes out of the extension"
        self._module = module
        self._context = context
        self._caches: WeakKeyDictionary[LayerCache, _native.LayerCache] = WeakKeyDictionary()

    def takes(self, cache: LayerCache) -> bool:
        keys, values = cache.keys, cache.values
        narrow = keys.width % 2 == 0 and keys.width <= MOST_WIDTH
        return values is not keys and values.width == keys.width and narrow

    def sums_scores(self, cache: LayerCache) -> bool:
        return True

    def plan(self, shape: StepShape, plane: PagedPlane) -> NativePlan:
        lengths, past, head_group = (
            np.ascontiguousarray(array, dtype=np.int64)
            for array in (shape.lengths, shape.past, shape.head_group)
        )
        tables = np.ascontiguousarray(shape.tables, dtype=np.int32)
        rows = self._module.StepRows(
            rows=len(lengths),
            groups=len(past),
            pages=tables.shape[2],
            kv_heads=len(head_group),
            block_size=plane.block_size,
            lengths=lengths.ctypes.data,
            past=past.ctypes.data,
            tables=tables.ctypes.data,
            head_group=head_group.ctypes.data,
        )
        return NativePlan(rows, rows.tokens, shape)

    def _cache(self, cache: LayerCache) -> _native.LayerCache:
        known = self._caches.get(cache)
        if known is None:
            known = self._caches[cache] = self._describe(cache)
        return known

    def _describe(self, cache: LayerCache) -> _native.LayerCache:
        keys, values = cache.keys, cache.values
        stored = (torch.bfloat16,) if keys.scales is None else (torch.int8,)
        if (keys.dtype, values.dtype) != stored * 2:
            raise ValueError("native attention needs a cache of bfloat16, or of int8 with scales")
        if (keys.scales is None) != (values.scales is None) or keys.width != values.width:
            raise ValueError("native attention needs keys and values of one kind and width")
        scales = [() if plane.scales is None else plane.scales.offsets for plane in (keys, values)]
        described: _native.LayerCache = self._module.LayerCache(
            pages=keys.pages.data_ptr(),
            page_bytes=keys.pages.shape[1],
            block_size=keys.block_size,
            width=keys.width,
            keys=keys.offsets,
            values=values.offsets,
            key_scales=scales[0],
            value_scales=scales[1],
        )
        return described

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        spec: AttentionSpec,
        plan: NativePlan,
        score_sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, width = q.shape
        _check(q, k, v, cos, sin, cache, plan)
        sums, sums_stride = 0, 0
        if score_sums is not None:
            sums, sums_stride = score_sums.data_ptr(), score_sums.stride(0)
            _check_sums(score_sums, k.shape[1], plan.score_slots)
        out = torch.empty((tokens, heads, width), dtype=torch.bfloat16)
        lse = torch.empty((tokens, heads), dtype=torch.float32)
        self._context.attend(
            self._cache(cache),
            plan.rows,
            heads,
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            spec.scale,
            spec.softcap or 0.0,
            spec.window or 0,
            spec.causal,
            out.data_ptr(),
            lse.data_ptr(),
            sums,
            sums_stride,
        )
        return out, lse

    def attend_past(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, plan: NativePlan
    ) -> tuple[Tensor, Tensor]:
        raise ValueError("native attention always writes")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    plan: NativePlan,
) -> None:
    """Memory is read by address: what does not fit is refused here."""
    kv = (plan.tokens, cache.keys.heads, cache.keys.width)
    angles = (plan.tokens, cache.keys.width // 2)
    fits = (
        (q.shape[0], q.shape[2]) == (kv[0], kv[2])
        and k.shape == kv == v.shape
        and cos.shape == angles == sin.shape
    )
    if not fits:
        raise ValueError(
            f"native attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit a step of "
            f"{plan.tokens} tokens and a cache of {kv[1]} heads, {kv[2]} wide"
        )
    half = torch.bfloat16
    if not (q.dtype == k.dtype == v.dtype == cos.dtype == sin.dtype == half):
        raise ValueError("native attention needs q, k, v, cos and sin in bfloat16")
    dense = q.stride(2) == k.stride(2) == v.stride(2) == 1
    if not (dense and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("native attention needs contiguous entries, cos and sin")


def _check_sums(score_sums: Tensor, kv_heads: int, slots: int) -> None:
    rows, columns = score_sums.shape
    fits = rows == kv_heads and columns >= slots and score_sums.stride(1) == 1
    if not fits or score_sums.dtype != torch.float32:
        raise ValueError(f"score_sums: must be float32 of at least {(kv_heads, slots)}")
