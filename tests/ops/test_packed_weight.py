"""The packed layout is the documented one, and unpacking undoes it to the bit."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConfigurationError
from headrace.ops.packed_weight import (
    BF16,
    FORMATS,
    WeightFormat,
    pack,
    pack_dense,
    part_shapes,
    store_rows,
    unpack,
    unpack_dense,
)
from tests.ops.linear_cases import random_packed, random_quantized

SIZES = [
    (rows, columns, gated)
    for rows, columns in ((1, 1), (16, 32), (17, 33), (34, 129), (70, 257), (96, 320))
    for gated in ((False, True) if rows % 2 == 0 else (False,))
]
INTEGERS = [format for format in FORMATS if format != BF16]


def stored_row(row: int, rows: int, gated: bool) -> tuple[int, int]:
    """Panel and place in it: halves of a gated weight take turns."""
    if not gated:
        return row // 16, row % 16
    half = rows // 2
    within, is_up = row % half, row >= half
    return 2 * (within // 16) + is_up, within % 16


@pytest.mark.parametrize(("rows", "columns", "gated"), SIZES)
def test_halves_lie_in_pairs(rows: int, columns: int, gated: bool) -> None:
    weight = torch.randn(rows, columns).bfloat16()
    packed = pack_dense(weight, gated)
    for n in range(rows):
        panel, lane = stored_row(n, rows, gated)
        for k in range(0, columns, 3):
            assert packed.values[panel, k // 2, lane, k % 2] == weight[n, k]
    assert packed.values.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
@pytest.mark.parametrize(("rows", "columns", "gated"), SIZES)
def test_integers_lie_in_steps(format: WeightFormat, rows: int, columns: int, gated: bool) -> None:
    weight = random_quantized(rows, columns, format)
    packed = pack(weight, format, gated)
    assert packed.scales is not None
    for n in range(rows):
        panel, lane = stored_row(n, rows, gated)
        for k in range(0, columns, 3):
            if format.bits == 8:
                assert packed.values[panel, k // 4, lane, k % 4] == weight.values[n, k]
                continue
            byte = int(packed.values[panel, k // 8, lane, k % 4])
            assert (byte >> 4 if k % 8 >= 4 else byte & 15) == weight.values[n, k]
        for group in range(weight.scales.shape[1]):
            scale = weight.scales[n, group]
            if format.bits == 8:
                assert packed.scales[panel * 16 + lane] == scale
            else:
                assert packed.scales[panel, group, lane] == scale
            if weight.zeros is not None:
                assert packed.zeros is not None
                assert packed.zeros[panel, group, lane] == weight.zeros[n, group]
    low, high = packed.values & 15, packed.values >> 4
    found = packed.values.sum() if format.bits == 8 else low.sum() + high.sum()
    assert found == weight.values.sum(), "the padding is not zero"
    assert packed.scales.count_nonzero() == weight.scales.count_nonzero()


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("rows", "columns", "gated"), SIZES)
def test_unpacking_undoes_packing(
    format: WeightFormat, rows: int, columns: int, gated: bool
) -> None:
    chosen = torch.randint(rows, (5,))
    if format == BF16:
        plain = torch.randn(rows, columns).bfloat16()
        half_packed = pack_dense(plain, gated)
        assert torch.equal(unpack_dense(half_packed), plain)
        assert torch.equal(unpack_dense(half_packed, chosen), plain[chosen])
        return
    weight = random_quantized(rows, columns, format)
    packed = pack(weight, format, gated)
    for found, kept in ((unpack(packed), slice(None)), (unpack(packed, chosen), chosen)):
        assert torch.equal(found.values, weight.values[kept])
        assert torch.equal(found.scales, weight.scales[kept])
        assert (found.zeros is None) == (weight.zeros is None)
        if found.zeros is not None and weight.zeros is not None:
            assert torch.equal(found.zeros, weight.zeros[kept])


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("rows", "columns", "gated"), SIZES)
def test_shapes_are_known_before(
    format: WeightFormat, rows: int, columns: int, gated: bool
) -> None:
    packed = random_packed(rows, columns, format, gated)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in packed.parts().items()}
    assert found == part_shapes(format, rows, columns, gated)
    unit = {16: 32, 8: 64, 4: max(64, format.group or 0)}[format.bits]
    padded = format.padded_columns(columns)
    assert padded % unit == 0 and columns <= padded < columns + unit


def test_a_bias_comes_to_its_panels() -> None:
    bias = torch.arange(1.0, 41.0)
    stored = store_rows(bias, gated=True).view(4, 16)
    assert stored[0].tolist() == list(range(1, 17)) and stored[1].tolist() == list(range(21, 37))
    assert stored[2].tolist() == [17, 18, 19, 20, *[0] * 12]
    assert stored[3].tolist() == [37, 38, 39, 40, *[0] * 12]


class TestNames:
    """Formats by name."""

    def test_each_is_found_by_its_own(self) -> None:
        assert [WeightFormat.parse(format.name) for format in FORMATS] == list(FORMATS)
        assert len({format.name for format in FORMATS}) == len(FORMATS) == 8

    def test_the_default_group(self) -> None:
        assert WeightFormat.parse("w4a8").name == "w4a8-g32"

    @pytest.mark.parametrize(
        "name", ["", "int4", "w4a8-g16", "w8a8-g32", "W4A8", "auto", "bf16-zp"]
    )
    def test_unknown_ones_list_the_known(self, name: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            WeightFormat.parse(name)
        assert repr(name) in str(caught.value)
        assert all(format.name in str(caught.value) for format in FORMATS)

    def test_bits_per_weight(self) -> None:
        found = {format.name: format.bits_per_weight for format in FORMATS}
        assert (found["bf16"], found["w8a8"]) == (16, 8)
        assert (found["w4a8-g32"], found["w4a8-g64-zp"]) == (4.5, 4.375)
