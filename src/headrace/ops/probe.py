"""What attention looked at, for those who want to know: the probabilities themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.ops.paged import AttentionSpec, PagedPlane

_WEIGHTS_AT_ONCE = 1 << 24
"""Probabilities in memory at once."""


def attention_weights(
    q: Tensor, lse: Tensor, keys: PagedPlane, pages: Tensor, past: int, spec: AttentionSpec
) -> Iterator[tuple[int, Tensor]]:
    """The probabilities that consecutive queries of one row gave to its slots, in parts.

    Args:
        q: ``[n, heads, width]``, rotated; lse: fp32 ``[n, heads]``, the log-sum-exp of their
            scores.
        keys: rotated; pages: int64, those that hold the row's ``past + n`` slots in order.

    Yields:
        The number of the first query of a part, and fp32
        ``[kv_heads, heads / kv_heads, queries, past + n]``.
    """
    context = past + len(q)
    read = torch.stack([keys.read(head, pages)[:context] for head in range(keys.heads)])
    slot = torch.arange(context, device=q.device)
    size = max(1, _WEIGHTS_AT_ONCE // (q.shape[1] * context))
    for start in range(0, len(q), size):
        part = q[start : start + size].float().transpose(0, 1)
        scores = torch.matmul(part.unflatten(0, (keys.heads, -1)), read[:, None].mT) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        shift = lse[start : start + size].T.unflatten(0, (keys.heads, -1))
        query = torch.arange(past + start, past + start + part.shape[1], device=q.device)
        distance = query[:, None] - slot
        hidden = (distance < 0) & spec.causal
        if spec.window is not None:
            hidden |= distance >= spec.window
        yield start, torch.exp(scores - shift[..., None]).masked_fill(hidden, 0.0)
