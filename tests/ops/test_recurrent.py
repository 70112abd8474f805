"""Recurrent layers by chunks of inputs, against the recurrences written out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops.recurrent import (
    CHUNK,
    RowSpans,
    causal_convolution,
    gated_delta,
    selective_scan,
)

HEADS, GROUPS, WIDTH, STATE = 4, 2, 6, 5
TABLE_ROWS = [3, 0, 5]
LENGTHS = {
    "single inputs": [1, 1, 1],
    "a chunk beside single inputs": [1, CHUNK, 1],
    "several chunks": [2 * CHUNK + 7, 3, CHUNK + 1],
}
FACTORS = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=LENGTHS)
def rows(request: pytest.FixtureRequest) -> RowSpans:
    return RowSpans(LENGTHS[request.param], TABLE_ROWS)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def parts(rows: RowSpans, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Of each row, in fp64."""
    return list(zip(*(x.double().split(rows.lengths) for x in tensors), strict=True))


def untouched(before: Tensor, after: Tensor) -> bool:
    """Whether the states of all other table rows are as they were."""
    others = [row for row in range(len(before)) if row not in TABLE_ROWS]
    return torch.equal(before[others], after[others])


@pytest.mark.parametrize("biased", [True, False])
def test_causal_convolution(rows: RowSpans, biased: bool) -> None:
    channels, size = 7, 4
    x, weight = normal(sum(rows.lengths), channels), normal(channels, size)
    bias = normal(channels) if biased else None
    state = normal(8, channels, size - 1)
    before = state.clone()
    found = causal_convolution(x, state, weight, bias, rows)
    wanted = []
    for row, (inputs,) in zip(rows.table_rows, parts(rows, x), strict=True):
        seen = torch.cat((before[row].double().T, inputs))
        for index in range(len(inputs)):
            out = (seen[index : index + size] * weight.T.double()).sum(0)
            wanted.append(out if bias is None else out + bias.double())
        torch.testing.assert_close(state[row].double(), seen[1 - size :].T)
    torch.testing.assert_close(found.double(), torch.stack(wanted), **FACTORS)
    assert untouched(before, state)


def test_selective_scan(rows: RowSpans) -> None:
    count = sum(rows.lengths)
    x, steps = normal(count, HEADS, WIDTH), normal(count, HEADS).abs()
    decay = -normal(HEADS).abs()
    into, out_of = normal(count, GROUPS, STATE), normal(count, GROUPS, STATE + 1)[..., :STATE]
    state = normal(8, HEADS, WIDTH * STATE)
    before = state.clone()
    found = selective_scan(x, steps, decay, into, out_of, state, rows)
    wanted = []
    for row, inputs in zip(rows.table_rows, parts(rows, x, steps, into, out_of), strict=True):
        now = before[row].double().view(HEADS, WIDTH, STATE)
        for value, step, b, c in zip(*inputs, strict=True):
            b, c = (each.repeat_interleave(HEADS // GROUPS, 0) for each in (b, c))
            kept = torch.exp(decay.double() * step)[:, None, None]
            now = kept * now + step[:, None, None] * value[:, :, None] * b[:, None, :]
            wanted.append((now * c[:, None, :]).sum(-1))
        torch.testing.assert_close(state[row].double(), now.flatten(1), **FACTORS)
    torch.testing.assert_close(found.double(), torch.stack(wanted), **FACTORS)
    assert untouched(before, state)


def test_gated_delta(rows: RowSpans) -> None:
    count = sum(rows.lengths)
    q, k = normal(count, HEADS, WIDTH), normal(count, HEADS + 1, WIDTH)[:, :HEADS]
    k = k / k.norm(dim=-1, keepdim=True)
    v = normal(count, HEADS, STATE)
    decay, strength = -normal(count, HEADS).abs(), normal(count, HEADS + 2)[:, :HEADS].sigmoid()
    state = normal(8, HEADS, WIDTH * STATE)
    before = state.clone()
    found = gated_delta(q, k, v, decay, strength, state, rows)
    wanted = []
    for row, inputs in zip(rows.table_rows, parts(rows, q, k, v, decay, strength), strict=True):
        now = before[row].double().view(HEADS, WIDTH, STATE)
        for query, key, value, log, share in zip(*inputs, strict=True):
            now = now * log.exp()[:, None, None]
            error = value - (key[:, :, None] * now).sum(1)
            now = now + share[:, None, None] * key[:, :, None] * error[:, None, :]
            wanted.append((query[:, :, None] * now).sum(1))
        torch.testing.assert_close(state[row].double(), now.flatten(1), **FACTORS)
    torch.testing.assert_close(found.double(), torch.stack(wanted), **FACTORS)
    assert untouched(before, state)


def test_a_decay_that_leaves_nothing() -> None:
    """Powers of it are 0, and never infinite or NaN."""
    count, rows = 2 * CHUNK, RowSpans([2 * CHUNK], [0])
    x, steps = normal(count, HEADS, WIDTH), torch.full((count, HEADS), 100.0)
    b = normal(count, GROUPS, STATE)
    state = torch.zeros(1, HEADS, WIDTH * STATE)
    decay = torch.full((HEADS,), -50.0)
    assert selective_scan(x, steps, decay, b, b, state, rows).isfinite().all()
    assert state.isfinite().all()
    q, v = normal(count, HEADS, WIDTH), normal(count, HEADS, STATE)
    k = q / q.norm(dim=-1, keepdim=True)
    state.zero_()
    out = gated_delta(q, k, v, torch.full((count, HEADS), -500.0), steps * 0 + 1.0, state, rows)
    assert out.isfinite().all() and state.isfinite().all()
