"""Rounding to nearest: what it finds is the nearest, and its scales are good ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from headrace.errors import ConfigurationError
from headrace.ops.packed_weight import BF16, FORMATS, QuantizedWeight, WeightFormat
from headrace.ops.scale_search import search_scales
from headrace.weights.quantizers import QUANTIZERS, make_quantizer
from headrace.weights.quantizers.round_to_nearest import RoundToNearest

QUANTIZED = [format for format in FORMATS if format != BF16]
GROUPED = [format for format in QUANTIZED if format.group is not None]


def quantized(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    return RoundToNearest(search_scales).quantize(weight, format)


def error(weight: Tensor, format: WeightFormat) -> float:
    """Of the approximation, as a share of the weight's root mean square."""
    difference = quantized(weight, format).dequantize(format) - weight
    return float(difference.square().mean().sqrt() / weight.square().mean().sqrt())


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (48, 256), (3, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_types(format: WeightFormat, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    found = quantized(weight, format)
    groups = 1 if format.group is None else -(-shape[1] // format.group)
    assert found.values.shape == shape and found.values.dtype == torch.uint8
    assert found.scales.shape == (shape[0], groups) and found.scales.dtype == torch.float32
    assert (found.zeros is not None) == format.zero_points
    if found.zeros is not None:
        assert found.zeros.shape == (shape[0], groups) and found.zeros.dtype == torch.uint8
    if format.group is not None:
        assert torch.equal(found.scales, found.scales.bfloat16().float())
        assert found.values.max() <= 15
    else:
        assert found.values.min() >= 1


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.name)
def test_every_value_is_the_nearest(format: WeightFormat) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 192)
    found = quantized(weight, format)
    best = (found.dequantize(format) - weight).abs()
    for value in range(1 if format.bits == 8 else 0, 1 << format.bits):
        other = QuantizedWeight(torch.full_like(found.values, value), found.scales, found.zeros)
        assert bool((best <= (other.dequantize(format) - weight).abs() + 1e-6).all())


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.name)
def test_what_a_format_can_hold_is_held(format: WeightFormat) -> None:
    """A weight on a grid of its own comes back."""
    torch.manual_seed(0)
    values = torch.randint(1 if format.bits == 8 else 0, 1 << format.bits, (12, 256))
    values[:, ::32] = 0 if format.bits == 4 else 1
    values[:, 1::32] = (1 << format.bits) - 1
    size = format.group or 256
    scales = (2.0 ** torch.randint(-9, 3, (12, 256 // size))).repeat_interleave(size, 1)
    weight = (values - format.zero) * scales
    torch.testing.assert_close(
        quantized(weight, format).dequantize(format), weight, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_spare_step_is_used_on_either_side(sign: float) -> None:
    """A grid of -8..7 reaches further on one side; scales have signs, so on the one needed."""
    weight = sign * torch.arange(8, -8, -1.0).repeat(2).view(1, 32)
    assert torch.equal(
        quantized(weight, FORMATS[2]).dequantize(FORMATS[2]).flatten(), weight.flatten()
    )


def test_zero_points_serve_lopsided_groups() -> None:
    torch.manual_seed(0)
    weight = torch.rand(16, 128) + 0.1
    plain, shifted = WeightFormat(4, 64), WeightFormat(4, 64, zero_points=True)
    assert error(weight, shifted) < 0.6 * error(weight, plain)


def test_errors_are_those_of_the_bits() -> None:
    """Of normally distributed weights; a scale that just covers each group has 10.3 % at 64."""
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    found = {format.name: error(weight, format) for format in QUANTIZED}
    assert found["w8a8"] < 0.009
    assert found["w4a8-g32"] < 0.082 and found["w4a8-g32-zp"] < 0.080
    assert found["w4a8-g64"] < 0.092 and found["w4a8-g128"] < 0.101
    for group in (32, 64, 128):
        assert found[f"w4a8-g{group}-zp"] < found[f"w4a8-g{group}"]


@pytest.mark.parametrize("format", GROUPED, ids=lambda f: f.name)
def test_no_scale_nearby_is_much_better(format: WeightFormat) -> None:
    """Against a fine search of scales around the one that was found."""
    torch.manual_seed(0)
    assert format.group is not None
    groups = torch.randn(60, format.group)
    values, scales, zeros = search_scales(groups, format)
    offsets = zeros.float()[:, None] if format.zero_points else torch.tensor(8.0)

    def squared(scale: Tensor) -> Tensor:
        grid = (groups / scale[:, None]).round() + offsets
        return ((grid.clamp(0, 15) - offsets) * scale[:, None] - groups).square().sum(1)

    found = ((values - offsets) * scales[:, None] - groups).square().sum(1)
    torch.testing.assert_close(found, squared(scales))
    best = torch.stack([squared(scales * f) for f in torch.linspace(0.7, 1.4, 141)]).amin(0)
    assert found.sum() < 1.05 * best.sum()


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.name)
class TestEdges:
    """Weights that have no scale."""

    def test_zeros(self, format: WeightFormat) -> None:
        weight = torch.randn(4, 256)
        weight[1] = 0
        weight[2, 128:] = 0
        found = quantized(weight, format).dequantize(format)
        assert bool((found[1] == 0).all()) and bool((found[2, 128:] == 0).all())

    @pytest.mark.parametrize("size", [1e-38, 1e-44])
    def test_almost_zero(self, format: WeightFormat, size: float) -> None:
        found = quantized(torch.randn(4, 128) * size, format)
        assert bool((found.dequantize(format) == 0).all())

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_a_number_is_not_hidden(self, format: WeightFormat, value: float) -> None:
        weight = torch.randn(3, 128)
        weight[1, 70] = value
        found = quantized(weight, format).dequantize(format)
        assert not found[1, 70].isfinite()
        assert found[0].isfinite().all() and found[2].isfinite().all()


def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(37, 100)
    for format, at_once in itertools.product(QUANTIZED, (1, 333)):
        whole = quantized(weight, format)
        with monkeypatch.context() as patch:
            patch.setattr("headrace.weights.quantizers.round_to_nearest._AT_ONCE", at_once)
            parts = quantized(weight, format)
        assert torch.equal(whole.values, parts.values)
        torch.testing.assert_close(whole.scales, parts.scales)  # sums may go in another order


def test_threads_make_no_difference() -> None:
    """What is quantized while loading is what a packed file holds, wherever it was made."""
    torch.manual_seed(0)
    weight, before = torch.randn(1000, 300), torch.get_num_threads()
    try:
        for format in QUANTIZED:
            torch.set_num_threads(1)
            one = quantized(weight, format)
            torch.set_num_threads(2)
            two = quantized(weight, format)
            assert torch.equal(one.values, two.values) and torch.equal(one.scales, two.scales)
    finally:
        torch.set_num_threads(before)


def test_by_name() -> None:
    assert [type(make_quantizer(search_scales, name)) for name in QUANTIZERS] == [RoundToNearest]
    with pytest.raises(ConfigurationError, match=r"'gptq'.*round-to-nearest"):
        make_quantizer(search_scales, "gptq")
