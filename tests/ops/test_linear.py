"""Linear operations: every version against the reference, and that against the definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.linear import ReferenceLinear, RMSNorm, quantize_activations
from headrace.ops.packed_weight import BF16, FORMATS, QuantizedWeight, WeightFormat, pack
from headrace.ops.table import VERSIONS
from tests.ops.function_cases import TOLERANCES
from tests.ops.linear_cases import CASES, LinearCase, random_packed, random_quantized

QUANTIZED = [format for format in FORMATS if format != BF16]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("version", VERSIONS["linear"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_versions_agree(case: LinearCase, version: str, dtype: torch.dtype) -> None:
    tested, expected = (
        case.linear(VERSIONS["linear"][name](dtype), dtype) for name in (version, "reference")
    )
    for x, options in case.calls(dtype):
        before = x.clone()
        found = tested(x, **options)
        assert found.dtype == (options["out_dtype"] or dtype)
        allowed = TOLERANCES[dtype]
        if dtype == torch.bfloat16:
            allowed = {"rtol": 2**-6, "atol": 2**-5}  # rounded after norm, product, gate and sum
        if case.format in QUANTIZED and options["norm"] is not None:
            # The last bit of a norm decides which way an activation is rounded to int8.
            allowed = {**allowed, "atol": 0.05}
        torch.testing.assert_close(found, expected(x, **options), **allowed)
        assert torch.equal(x, before)


def by_definition(x: Tensor, weight: QuantizedWeight, format: WeightFormat) -> Tensor:
    """Integer products of each group, then the scales; fp64 ``[T, N]``."""
    columns = x.shape[1]
    size = format.group or columns
    values, scales = quantize_activations(x, format.activation_group)
    product = torch.zeros(len(x), len(weight.values), dtype=torch.float64)
    for group, start in enumerate(range(0, columns, size)):
        q = values[:, start : start + size].long()
        u = weight.values[:, start : start + size].long()
        zero = torch.tensor(128 if format.bits == 8 else 8).expand(len(u))
        if weight.zeros is not None:
            zero = weight.zeros[:, group].long()
        sums = q @ u.T - q.sum(1, keepdim=True) * zero
        x_scales = scales[:, start // (format.activation_group or columns)]
        product += sums * torch.outer(x_scales.double(), weight.scales[:, group].double())
    return product


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.name)
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_the_reference_is_the_definition(format: WeightFormat, tokens: int) -> None:
    torch.manual_seed(tokens)
    x, bias = torch.randn(tokens, 600), torch.randn(70)
    x[:, 300:] *= 10  # scales differ
    weight = random_quantized(70, 600, format)
    expected = by_definition(x, weight, format) + bias
    found = ReferenceLinear(torch.float32).packed(pack(weight, format), bias)(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_surrounds_the_product() -> None:
    """Norm, product, bias, gate, residual, in this order."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(7, 24), torch.randn(40, 24), torch.randn(40)
    norm, residual = RMSNorm(torch.rand(24), 0.5), torch.randn(7, 20)
    normed = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    gate, up = (normed @ weight.T + bias).chunk(2, dim=-1)
    expected = gate / (1 + torch.exp(-gate)) * up + residual
    linear = ReferenceLinear(torch.float32).dense(weight, bias, gated=True)
    torch.testing.assert_close(linear(x, norm=norm, residual=residual), expected)


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.name)
def test_a_quantized_product_is_close_to_the_plain_one(format: WeightFormat) -> None:
    """Activations in 8 bits cost less than one percent."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 256), random_packed(64, 256, format, False)
    linear = ReferenceLinear(torch.float32).packed(weight)
    plain = x @ linear.rows(torch.arange(64)).T
    assert (linear(x) - plain).norm() < 0.015 * plain.norm()
    assert (linear(x) - plain).norm() > 0


class TestActivations:
    """Symmetric int8 for each token and group."""

    def test_by_hand(self) -> None:
        x = torch.tensor([[254.0, -3.0, 5.0, 1.0, 0.0, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]])
        values, scales = quantize_activations(x, 4)
        assert torch.equal(scales, torch.tensor([[254.0, 127.0], [127.0, 0.5]]) / 127)
        # Halves go to the even neighbour: -1.5, 2.5, 0.5.
        assert values.tolist() == [[127, -2, 2, 0, 0, -127], [0, 0, 0, 0, 0, 127]]
        assert values.dtype == torch.int8 and scales.dtype == torch.float32

    def test_one_scale_for_all(self) -> None:
        values, scales = quantize_activations(torch.tensor([[1.0, -4.0, 2.0]]), None)
        assert torch.equal(scales, torch.tensor([[4.0]]) / 127)
        assert values.tolist() == [[32, -127, 64]]

    def test_halves_are_quantized_in_full_precision(self) -> None:
        x = torch.randn(5, 64).bfloat16()
        for found, expected in zip(
            quantize_activations(x, 32), quantize_activations(x.float(), 32), strict=True
        ):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_a_number_is_seen(self, value: float) -> None:
        x = torch.ones(2, 64)
        x[1, 3] = value
        out = ReferenceLinear(torch.float32).packed(random_packed(8, 64, FORMATS[2], False))(x)
        assert out[0].isfinite().all() and not out[1].isfinite().any()


class TestRows:
    """Rows of the weight, as a tied embedding looks them up."""

    @pytest.mark.parametrize("version", VERSIONS["linear"])
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
    def test_of_packed_weights(
        self, format: WeightFormat, dtype: torch.dtype, version: str
    ) -> None:
        torch.manual_seed(0)
        ids = torch.tensor([5, 0, 99, 17, 17])
        linear = VERSIONS["linear"][version](dtype).packed(random_packed(100, 70, format, False))
        # The product with unit vectors, whose quantization is exact, gives the columns.
        columns = ReferenceLinear(torch.float32)
        torch.manual_seed(0)
        weight = columns.packed(random_packed(100, 70, format, False))(torch.eye(70)).T
        assert torch.equal(linear.rows(ids), weight[ids].to(dtype))

    @pytest.mark.parametrize("version", VERSIONS["linear"])
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    def test_of_dense_weights(self, dtype: torch.dtype, version: str) -> None:
        weight, ids = torch.randn(100, 48).to(dtype), torch.tensor([5, 0, 99, 17])
        x = torch.randn(3, 48).to(dtype)
        linear = VERSIONS["linear"][version](dtype).dense(weight, indexed=True)
        assert torch.equal(linear.rows(ids), weight[ids])
        torch.testing.assert_close(linear(x), F.linear(x, weight), rtol=2**-7, atol=2**-5)
        with pytest.raises(ValueError, match="looking up"):
            VERSIONS["linear"][version](dtype).dense(weight).rows(ids)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_bytes_are_counted(format: WeightFormat) -> None:
    packed = random_packed(64, 128, format, False)
    linear = ReferenceLinear(torch.float32).packed(packed)
    assert (
        linear.num_bytes
        == packed.num_bytes
        == 64 * 128 * format.bits_per_weight / 8 + (64 * 4 if format.bits == 8 else 0)
    )


def test_large_weights_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, x = random_packed(100, 64, FORMATS[3], True), torch.randn(5, 64)
    whole = ReferenceLinear(torch.float32).packed(weight)(x)
    monkeypatch.setattr("headrace.ops.linear._ROWS_AT_ONCE", 17)
    parts = ReferenceLinear(torch.float32).packed(weight)(x)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
