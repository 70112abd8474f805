"""Operations of layers that keep a state of fixed size for each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowSpans:
    """The inputs of a micro-batch that belong together.

    Args:
        lengths: inputs of each row, one after another.
        table_rows: where the states of each row are.
    """

    lengths: list[int]
    table_rows: list[int]

    @property
    def is_single(self) -> bool:
        """Whether each row has one input."""
        return len(self.lengths) == sum(self.lengths)


def causal_convolution(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, rows: RowSpans
) -> Tensor:
    """Each channel convolved along its row, behind what the row had before.

    Args:
        x: ``[T, channels]``.
        state: the last inputs of each row, ``[table rows, channels, size - 1]``; brought up to
            date.
        weight: ``[channels, size]``, the last for the input itself; bias: ``[channels]``.

    Returns:
        ``[T, channels]`` in x's dtype.
    """
    size = weight.shape[1]
    if rows.is_single:
        places = torch.tensor(rows.table_rows, device=x.device)
        seen = torch.cat((state[places].to(x.dtype), x.unsqueeze(-1)), dim=-1)
        state[places] = seen[..., 1:].to(state.dtype)
        out = (seen.float() * weight.float()).sum(-1)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    outs = []
    for part, place in zip(x.split(rows.lengths), rows.table_rows, strict=True):
        seen = torch.cat((state[place].to(x.dtype), part.T), dim=-1)
        state[place] = seen[:, 1 - size :].to(state.dtype)
        out = F.conv1d(seen[None], weight.unsqueeze(1), bias, groups=len(weight))
        outs.append(out[0].T)
    return torch.cat(outs)


CHUNK = 64
"""Inputs whose effects on each other are computed by products, without a loop."""


def selective_scan(
    x: Tensor,
    steps: Tensor,
    decay: Tensor,
    into: Tensor,
    out_of: Tensor,
    state: Tensor,
    rows: RowSpans,
) -> Tensor:
    """The recurrence of Mamba-2: ``s = exp(decay * step) * s + step * x into^T``, ``s out_of``.

    Transformers are SSMs, section 6 (the chunked form) and 2 (the recurrence).

    Args:
        x: ``[T, heads, width]``.
        steps: fp32 ``[T, heads]``, at least 0; decay: fp32 ``[heads]``, at most 0.
        into, out_of: ``[T, groups, state size]``; heads of a group share them.
        state: fp32 ``[table rows, heads, width * state size]``; brought up to date.

    Returns:
        fp32 ``[T, heads, width]``.
    """
    heads, width = x.shape[1:]
    each = heads // into.shape[1]
    x, into, out_of = x.float(), into.float(), out_of.float()
    into, out_of = (part.repeat_interleave(each, dim=1) for part in (into, out_of))
    places = torch.tensor(rows.table_rows, device=x.device)
    if rows.is_single:
        now = state[places].unflatten(-1, (width, -1))
        now = now * torch.exp(steps * decay)[..., None, None]
        now += (x * steps.unsqueeze(-1)).unsqueeze(-1) * into.unsqueeze(2)
        state[places] = now.flatten(2)
        read: Tensor = now @ out_of.unsqueeze(-1)
        return read.squeeze(-1)
    outs = []
    parts = zip(*(part.split(rows.lengths) for part in (x, steps, into, out_of)), strict=True)
    for place, (values, dt, b, c) in zip(rows.table_rows, parts, strict=True):
        now = state[place].unflatten(-1, (width, -1))
        for start in range(0, len(values), CHUNK):
            part = slice(start, start + CHUNK)
            out, now = _scan_chunk(values[part], dt[part], decay, b[part], c[part], now)
            outs.append(out)
        state[place] = now.flatten(1)
    return torch.cat(outs)


def _scan_chunk(
    x: Tensor, steps: Tensor, decay: Tensor, into: Tensor, out_of: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk ``[L, heads, width]``, and the state behind it."""
    x, into, out_of = (part.transpose(0, 1) for part in (x, into, out_of))
    past = torch.cumsum(steps * decay, 0).T
    # How much of an input is left when a later one comes.
    left = torch.exp((past.unsqueeze(2) - past.unsqueeze(1)).tril())
    inner = (out_of @ into.transpose(1, 2) * left).tril() * steps.T.unsqueeze(1)
    out = inner @ x + (out_of @ state.transpose(1, 2)) * past.exp().unsqueeze(-1)
    rest = torch.exp(past[:, -1:] - past) * steps.T
    state = state * past[:, -1].exp()[:, None, None]
    state = state + (x * rest.unsqueeze(-1)).transpose(1, 2) @ into
    return out.transpose(0, 1), state


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    state: Tensor,
    rows: RowSpans,
) -> Tensor:
    """The gated delta rule: ``s = a s (1 - b k k^T) + b v k^T``, read out by ``q``.

    Gated Delta Networks, section 3.1.

    Args:
        q, k: ``[T, heads, key width]``, as they are used; v: ``[T, heads, value width]``.
        log_decay: fp32 ``[T, heads]``, logarithm of a; strength: b, ``[T, heads]``.
        state: fp32 ``[table rows, heads, key width * value width]``; brought up to date.

    Returns:
        fp32 ``[T, heads, value width]``.
    """
    q, k, v, strength = (part.float() for part in (q, k, v, strength))
    width = k.shape[-1]
    places = torch.tensor(rows.table_rows, device=q.device)
    if rows.is_single:
        now = state[places].unflatten(-1, (width, -1)) * log_decay.exp()[..., None, None]
        error = (v - (k.unsqueeze(-2) @ now).squeeze(-2)) * strength.unsqueeze(-1)
        now = now + k.unsqueeze(-1) * error.unsqueeze(-2)
        state[places] = now.flatten(2)
        read: Tensor = q.unsqueeze(-2) @ now
        return read.squeeze(-2)
    outs = []
    parts = zip(*(part.split(rows.lengths) for part in (q, k, v, log_decay, strength)), strict=True)
    for place, row in zip(rows.table_rows, parts, strict=True):
        now = state[place].unflatten(-1, (width, -1))
        for start in range(0, len(row[0]), CHUNK):
            here = slice(start, start + CHUNK)
            qs, ks, vs, decays, strengths = (part[here].transpose(0, 1) for part in row)
            out, now = _delta_chunk(qs, ks, vs, decays, strengths, now)
            outs.append(out)
        state[place] = now.flatten(1)
    return torch.cat(outs)


def _delta_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk ``[L, heads, width]``, and the state behind it; inputs ``[heads, L, *]``.

    What each input writes depends on what those before it wrote, a triangular system (section
    3.3, the extended WY representation).
    """
    past = torch.cumsum(log_decay, 1)
    left = torch.exp((past.unsqueeze(2) - past.unsqueeze(1)).tril())
    system = (k @ k.transpose(1, 2) * left).tril(-1) * strength.unsqueeze(-1)
    unit = torch.eye(k.shape[1], device=k.device)
    from_past = (k @ state) * past.exp().unsqueeze(-1)
    right = (v - from_past) * strength.unsqueeze(-1)
    written = torch.linalg.solve_triangular(system + unit, right, upper=False, unitriangular=True)
    out = (q @ k.transpose(1, 2) * left).tril() @ written
    out = out + (q @ state) * past.exp().unsqueeze(-1)
    rest = torch.exp(past[:, -1:] - past).unsqueeze(-1)
    state = state * past[:, -1].exp()[:, None, None] + (k * rest).transpose(1, 2) @ written
    return out.transpose(0, 1), state
