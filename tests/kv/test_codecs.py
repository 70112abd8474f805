"""Codecs of the KV cache: what they store, and how near it comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headrace.contracts.cache import ITEM_BYTES, attention_layout
from headrace.contracts.kv_codec import KVCodec, coded_units
from headrace.kv.codecs.gear import Gear, low_rank
from headrace.kv.codecs.kivi import Kivi
from headrace.kv.packed_bits import (
    BITS,
    dequantize_range,
    pack_bits,
    quantize_range,
    unpack_bits,
)

HEADS, UNIT, WIDTH = 2, 32, 24
CODECS: list[KVCodec] = [
    *(Gear(bits=bits, unit=UNIT) for bits in (2, 4, 8)),
    Gear(rank=0, outliers=0, unit=UNIT),
    Gear(rank=4, outliers=0.1, unit=UNIT),
    *(Kivi(bits=bits, group=8, unit=UNIT) for bits in BITS),
    Kivi(bits=4, unit=UNIT),
]


def entries(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with loud channels, and values, each with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(HEADS, UNIT, WIDTH, generator=generator) for _ in range(2))
    keys[:, :, 3] *= 8
    values[:, 5, 7] = 30.0
    return keys, values


def coded(codec: KVCodec, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What comes back of a unit, having been stored as declared."""
    parts = dict(codec.encode(keys, values))
    declared = codec.parts(HEADS, keys.shape[1], WIDTH)
    assert parts.keys() == {part.name for part in declared}
    for part in declared:
        tensor = parts[part.name]
        assert tuple(tensor.shape) == part.shape
        assert str(tensor.dtype) == f"torch.{part.dtype}"
        assert tensor.nbytes <= part.num_bytes < tensor.nbytes + 64
        assert tensor.element_size() == ITEM_BYTES[part.dtype]
    batch = {name: torch.stack((tensor, tensor)) for name, tensor in parts.items()}
    found = codec.decode(batch)
    for tensor in found:
        assert torch.equal(tensor[0], tensor[1])
    return found[0][0], found[1][0]


def error(codec: KVCodec) -> float:
    keys, values = entries()
    found = coded(codec, keys, values)
    return sum(float((a - b).square().mean()) for a, b in zip(found, (keys, values), strict=True))


@given(
    st.sampled_from(BITS),
    st.lists(st.integers(0, 255), min_size=16, max_size=16),
)
def test_packed_bits(bits: int, values: list[int]) -> None:
    levels = torch.tensor(values, dtype=torch.uint8) & (2**bits - 1)
    packed = pack_bits(levels, bits)
    assert packed.numel() == 16 * bits // 8
    assert torch.equal(unpack_bits(packed, bits), levels)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_near(bits: int) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 100
    levels, step, lowest = quantize_range(x, bits, 1)
    assert (dequantize_range(levels, step, lowest) - x).abs().max() < 0.52 * step.float().max()
    same, *scale = quantize_range(torch.full((2, 8), 3.0), bits, 1)
    assert torch.equal(dequantize_range(same, *scale), torch.full((2, 8), 3.0))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_units_come_back(codec: Any) -> None:
    keys, values = entries()
    assert codec.unit_slots(4) == UNIT
    found = coded(codec, keys, values)
    for tensor, wanted in zip(found, (keys, values), strict=True):
        assert tensor.shape == wanted.shape
        spread = float(wanted.max() - wanted.min())
        assert (tensor - wanted).abs().max() < 0.6 * spread / (2**codec.bits - 1)


def test_more_bits_and_corrections_come_nearer() -> None:
    by_bits = [error(Gear(bits=bits, rank=0, outliers=0, unit=UNIT)) for bits in (2, 4, 8)]
    assert by_bits[0] > 10 * by_bits[1] > 100 * by_bits[2]
    mended = ((2, 0.0), (0, 0.1), (2, 0.1))
    errors = [error(Gear(bits=2, rank=rank, outliers=share)) for rank, share in mended]
    assert max(errors) < by_bits[0] and errors[2] < min(errors[:2])


def test_outliers_are_kept_as_they_are() -> None:
    keys, values = entries()
    _, found = coded(Gear(bits=2, outliers=0.1, unit=UNIT), keys, values)
    assert found[0, 5, 7] == 30.0


def test_the_power_method_finds_what_is_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 20, 3, generator=generator) @ torch.randn(2, 3, 9, generator=generator)
    left, right = low_rank(x, 3)
    assert (left.float() @ right.float() - x).abs().max() < 0.02


def test_units_lie_in_fewer_pages() -> None:
    layout = attention_layout(layers=4, kv_heads=2, head_dim=32, dtype="bfloat16", block_size=16)
    [unit] = coded_units(Gear(unit=120), layout)
    assert unit.slots == 128
    assert unit.pages < layout.pages_for(128)
    ends: dict[int, int] = {}
    for place in (place for places in unit.places.values() for place in places):
        assert place.offset == ends.get(place.page, 0)
        ends[place.page] = place.offset + place.part.num_bytes
    assert len(ends) == unit.pages and max(ends.values()) <= layout.page_bytes
    assert list(unit.places) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="make units longer"):
        coded_units(Gear(bits=8, unit=16), layout)
    with pytest.raises(ValueError, match="make units shorter"):
        coded_units(Gear(unit=4096), layout)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Gear, {"bits": 3}, "bits must be 2, 4 or 8"),
        (Gear, {"rank": -1}, "rank must be"),
        (Gear, {"outliers": 0.5}, "outliers must be"),
        (Gear, {"unit": 4}, "unit must be"),
        (Kivi, {"bits": 3}, "bits must be"),
        (Kivi, {"group": 5}, "group must be"),
        (Kivi, {"unit": 40}, "unit must be a multiple of the group, 32"),
    ],
)
def test_options_out_of_range(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
