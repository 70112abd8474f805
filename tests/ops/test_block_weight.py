"""Weights in planes of bits: packing loses nothing, every kernel computes what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops import extension
from headrace.ops.block_weight import (
    PLANES,
    BlockLayout,
    BlockParts,
    BlockWeight,
    pack_blocks,
    unpack_blocks,
)
from headrace.ops.linear import Linear, ReferenceLinear, RMSNorm
from headrace.ops.native_linear import NativeLinear, NativeLinearOps, native_rms_norm

MODULE = extension.extension()
assert MODULE is not None, "the tests need the native kernels: build the package with a compiler"
ISAS = MODULE.supported_isas()

TABLE = (-128, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 127)
LAYOUTS = {
    "4 bits": BlockLayout(4, 32, zero=8),
    "4 bits, groups of 16": BlockLayout(4, 16, zero=8),
    "4 bits, groups of 128": BlockLayout(4, 128),
    "4 bits, groups of 512": BlockLayout(4, 256, zero=8, super=2),
    "5 bits": BlockLayout(5, 32, zero=16),
    "5 bits, lows": BlockLayout(5, 32),
    "8 bits": BlockLayout(8, 32, zero=128),
    "8 bits, lows": BlockLayout(8, 64),
    "8 bits, zeros": BlockLayout(8, 64),
    "2 bits, two levels": BlockLayout(2, 16, super=16),
    "3 bits, two levels": BlockLayout(3, 16, zero=4, super=16),
    "4 bits, two levels": BlockLayout(4, 32, super=8),
    "6 bits, two levels": BlockLayout(6, 16, zero=32, super=16),
    "table": BlockLayout(4, 32, table=TABLE),
    "table, two levels": BlockLayout(4, 32, super=8, table=TABLE),
}
LOWS = ("2 bits, two levels", "4 bits, two levels", "5 bits, lows", "8 bits, lows")
ZEROS = ("4 bits, groups of 128", "8 bits, zeros")


def random_parts(name: str, rows: int, columns: int, wide: bool = False) -> BlockParts:
    """Any values that a layout can hold."""
    layout = LAYOUTS[name]
    groups = -(-columns // layout.group)
    supers = -(-groups // layout.super)
    dtype = torch.bfloat16 if wide else torch.float16
    two_levels = "two levels" in name
    size = (columns * 4.0 ** min(layout.bits, 7)) ** -0.5 / (20 if two_levels else 1)

    def factors() -> Tensor:
        return (torch.randn(rows, supers) * size).to(dtype)

    def steps(lowest: int) -> Tensor:
        return torch.randint(lowest, 64, (rows, groups), dtype=torch.int8)

    lows = name in LOWS
    return BlockParts(
        torch.randint(0, 1 << layout.bits, (rows, columns), dtype=torch.uint8),
        factors(),
        steps(0 if lows else -32) if two_levels else None,
        factors() if lows else None,
        steps(0) if lows and two_levels else None,
        torch.randint(0, 1 << layout.bits, (rows, groups), dtype=torch.uint8)
        if name in ZEROS
        else None,
    )


@pytest.fixture(params=ISAS, scope="module")
def context(request: pytest.FixtureRequest) -> extension._native.Context:
    return MODULE.Context(2, request.param)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gated", [False, True])
def test_packing_loses_nothing(name: str, gated: bool) -> None:
    torch.manual_seed(0)
    parts = random_parts(name, 50, 512)
    packed = pack_blocks(parts, LAYOUTS[name], gated)
    fields = ("values", "factors", "steps", "low_factors", "low_steps", "zeros")
    whole = unpack_blocks(packed)
    assert all(same(getattr(whole, field), getattr(parts, field)) for field in fields)
    rows = torch.tensor([3, 49, 3, 0, 25])
    some = unpack_blocks(packed, rows)
    assert torch.equal(some.values, parts.values[rows])
    assert torch.equal(some.factors, parts.factors[rows])


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_stand_for_what_the_layout_says(name: str) -> None:
    torch.manual_seed(1)
    layout, parts = LAYOUTS[name], random_parts(name, 3, 512)
    found = parts.dequantize(layout)
    for row, column in ((0, 0), (1, 17), (2, 511), (0, 300)):
        group, place = column // layout.group, column // (layout.group * layout.super)
        value = int(parts.values[row, column])
        scale = float(parts.factors[row, place])
        scale *= 1 if parts.steps is None else int(parts.steps[row, group])
        if parts.low_factors is not None:
            low = float(parts.low_factors[row, place])
            low *= 1 if parts.low_steps is None else int(parts.low_steps[row, group])
            wanted = scale * value + low
        else:
            zero = layout.zero if parts.zeros is None else int(parts.zeros[row, group])
            wanted = scale * (layout.table[value] if layout.table else value - zero)
        assert float(found[row, column]) == pytest.approx(wanted, rel=1e-6)


def test_bytes_are_those_of_the_bits() -> None:
    """Of a K-quant of 4 bits: values, a step and a low step for 32, two factors for 256."""
    packed = pack_blocks(random_parts("4 bits, two levels", 64, 512), LAYOUTS["4 bits, two levels"])
    assert packed.num_bytes * 8 / (64 * 512) == 4 + 16 / 32 + 32 / 256
    for bits, planes in PLANES.items():
        assert sum(planes) == bits


def expected_linear(in_halves: bool, weight: BlockWeight, bias: Tensor | None) -> Linear:
    """In fp32, of the weight rounded to bfloat16 where the tested product takes that."""
    ops, bias = ReferenceLinear(torch.float32), None if bias is None else bias.float()
    if not in_halves:
        return ops.blocks(weight, bias)
    rounded = unpack_blocks(weight).dequantize(weight.layout).bfloat16().float()
    return ops.dense(rounded, bias, gated=weight.gated)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "columns", "gated"),
    [(16, 256, False), (7, 301, False), (40, 512, False), (100, 768, True)],
)
def test_kernels(
    context: extension._native.Context, name: str, rows: int, columns: int, gated: bool
) -> None:
    torch.manual_seed(rows)
    layout = LAYOUTS[name]
    columns += 32 if layout.super == 1 and layout.group == 32 else 0
    weight = pack_blocks(random_parts(name, rows, columns, wide=gated), layout, gated)
    bias, scale = torch.randn(rows).bfloat16(), torch.rand(columns).bfloat16()
    for tokens in (1, 2, 3, 4, 5, 9, 33, 97, 130):
        x = torch.randn(tokens, columns + 7).bfloat16()[:, 3 : columns + 3]
        norm = RMSNorm(scale, 1e-5) if tokens % 2 else None
        residual = torch.randn(tokens, rows // 2 if gated else rows).bfloat16()
        given = bias if tokens % 3 else None
        linear = NativeLinearOps(context).blocks(weight, given)
        found = linear(x, norm=norm, residual=residual, out_dtype=torch.float32)
        normed = x if norm is None else native_rms_norm(context, x, scale, norm.eps)
        assert isinstance(linear, NativeLinear)
        reference = expected_linear(linear.in_halves(tokens), weight, given)
        expected = reference(normed.float(), residual=residual.float())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        if gated:
            open_expected = reference.ungated(normed.float())
            opened = linear.ungated(x, norm=norm).float()
            torch.testing.assert_close(opened, open_expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_largest_products(context: extension._native.Context, name: str) -> None:
    """Values and activations at the ends of their ranges: what sums are kept in holds them."""
    torch.manual_seed(4)
    layout, parts = LAYOUTS[name], random_parts(name, 64, 512)
    highest = (1 << layout.bits) - 1
    parts.values[:16], parts.values[16:32] = highest, 0
    parts.values[32:48, ::2] = highest
    weight = pack_blocks(parts, layout)
    x = torch.ones(4, 512).bfloat16()
    x[1], x[2, ::2], x[3, 1::2] = -1, -1, -1
    reference, linear = (
        ops.blocks(weight) for ops in (ReferenceLinear(torch.float32), NativeLinearOps(context))
    )
    for rows in (x, *x.split(1)):
        found = linear(rows, out_dtype=torch.float32)
        torch.testing.assert_close(found, reference(rows.float()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows(context: extension._native.Context, name: str) -> None:
    torch.manual_seed(3)
    weight = pack_blocks(random_parts(name, 70, 499), LAYOUTS[name])
    ids = torch.tensor([69, 0, 17, 17])
    found = NativeLinearOps(context).blocks(weight).rows(ids)
    expected = ReferenceLinear(torch.bfloat16).blocks(weight).rows(ids)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def test_scales_that_are_not_finite_reach_the_result(context: extension._native.Context) -> None:
    parts = random_parts("4 bits", 16, 64)
    parts.factors[3, 1] = float("nan")
    parts.factors[5, 0] = float("inf")
    linear = NativeLinearOps(context).blocks(pack_blocks(parts, LAYOUTS["4 bits"]))
    out = linear(torch.ones(1, 64).bfloat16())[0]
    assert out.isnan()[3] and not out.isfinite()[5]
    assert out.isfinite().sum() == 14


def test_factors_that_hold_for_less_than_a_scale_of_activations_does(
    context: extension._native.Context,
) -> None:
    layout = BlockLayout(4, 32, super=4)
    steps = torch.ones(16, 8, dtype=torch.int8)
    parts = BlockParts(torch.zeros(16, 256, dtype=torch.uint8), torch.ones(16, 2).half(), steps)
    with pytest.raises(ValueError, match="steps: their factors must hold for multiples of 256"):
        NativeLinearOps(context).blocks(pack_blocks(parts, layout))
