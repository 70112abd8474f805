"""Weights that are read from disk for a while multiply as they did in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headrace.disk import ALIGNMENT, DiskFile, FilePlace
from headrace.ops.block_weight import pack_blocks
from headrace.ops.linear import Linear, LinearOps, ReferenceLinear
from headrace.ops.native_linear import NativeLinearOps
from headrace.ops.packed_weight import FORMATS, WeightFormat
from headrace.weights.streaming import (
    StoredPart,
    StreamingLinears,
    WeightTier,
    arrange,
    layer_of,
)
from tests.ops.linear_cases import random_packed
from tests.ops.test_block_weight import LAYOUTS, MODULE, random_parts

ROWS, COLUMNS, LAYERS = 48, 256, 5


def test_the_layer_of_a_name() -> None:
    names = ("model.layers.12.mlp.experts.3.up_proj", "transformer.h.0.attn", "lm_head", "h2.x")
    assert [layer_of(name) for name in names] == [12, 0, None, None]


@given(
    gaps=st.lists(st.integers(0, 1 << 17), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 20_000), min_size=8, max_size=8),
    files=st.lists(st.sampled_from([None, Path("a"), Path("b")]), min_size=8, max_size=8),
    order=st.randoms(),
)
def test_what_is_read_for_a_layer(
    gaps: list[int], lengths: list[int], files: list[Path | None], order: st.DataObject
) -> None:
    """Aligned reads that do not overlap in the buffer, and bring every byte to its place."""
    parts, ends = [], dict.fromkeys(files, 0)
    for gap, length, path in zip(gaps, lengths, files, strict=False):
        offset = ends[path] + gap
        parts.append(StoredPart(path, offset, torch.uint8, (length,), length))
        ends[path] = offset + length
    order.shuffle(parts)  # type: ignore[attr-defined]
    buffer: dict[int, tuple[Path | None, int]] = {}
    for segment in arrange(parts):
        assert segment.offset % ALIGNMENT == segment.size % ALIGNMENT == 0
        assert segment.place % ALIGNMENT == 0 and segment.place not in buffer
        assert segment.size - ALIGNMENT < segment.least <= segment.size
        for byte in (0, segment.size - 1):
            buffer[segment.place + byte] = segment.path, segment.offset + byte
        for part in parts:
            first = part.offset - segment.offset
            if part.path == segment.path and 0 <= first < segment.size:
                assert part.place == segment.place + first
                assert first + part.num_bytes <= segment.least
    assert all(part.place >= 0 for part in parts)


@pytest.fixture
def native() -> LinearOps:
    assert MODULE is not None
    return NativeLinearOps(MODULE.Context(1))


@pytest.fixture(params=[1, 2, 3])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WeightTier]:
    """Layers 0, 2 and 4 on disk, of which some are in memory at once."""
    slots = request.param
    made = WeightTier(
        {0, 2, 4},
        lambda: DiskFile.scratch(tmp_path, 1),
        direct=True,
        slots=slots,
        ahead=slots > 1,
    )
    yield made
    made.close()


Make = Callable[[LinearOps, int], Linear]
"""A weight of a layer."""


def check(tier: WeightTier, base: LinearOps, make: Make, dtype: torch.dtype) -> None:
    """Two weights a layer, over some steps, one of which ends early."""
    streaming = StreamingLinears(base, dtype, tier)
    placed: list[list[Linear]] = []
    plain: list[list[Linear]] = []
    for layer in range(LAYERS):
        placed.append([])
        plain.append([])
        for seed in (layer, 100 + layer):
            streaming.expect(f"layers.{layer}.weight")
            placed[-1].append(make(streaming, seed))
            plain[-1].append(make(base, seed))
    tier.open()
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    for steps in range(4):
        tier.begin(1)
        for layer in range(LAYERS):
            tier.enter(layer, 0)
            for one, other in zip(placed[layer], plain[layer], strict=True):
                assert torch.equal(one(x), other(x)) and one.num_bytes == other.num_bytes
            if steps == 2 and layer == 3:
                tier.stop()
                break
            tier.leave(layer, 0)
        else:
            tier.end()
    with pytest.raises(RuntimeError, match="not in memory: its layer does not run now"):
        placed[0][0](x)


def weight_of(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gated", [False, True])
def test_dense(tier: WeightTier, native: LinearOps, gated: bool) -> None:
    bias = weight_of(7)[:, 0].bfloat16()
    check(
        tier,
        native,
        lambda ops, seed: ops.dense(weight_of(seed).bfloat16(), bias, gated=gated),
        torch.bfloat16,
    )


def test_dense_in_plain_order(tier: WeightTier) -> None:
    base = ReferenceLinear(torch.float32)
    check(tier, base, lambda ops, seed: ops.dense(weight_of(seed)), torch.float32)


@pytest.mark.parametrize("format", FORMATS[:4], ids=lambda format: format.name)
def test_packed(tier: WeightTier, native: LinearOps, format: WeightFormat) -> None:
    def make(ops: LinearOps, seed: int) -> Linear:
        torch.manual_seed(seed)
        return ops.packed(random_packed(ROWS, COLUMNS, format, False))

    check(tier, native, make, torch.bfloat16)


@pytest.mark.parametrize("name", ["5 bits", "4 bits, two levels", "table"])
def test_blocks(tier: WeightTier, native: LinearOps, name: str) -> None:
    def make(ops: LinearOps, seed: int) -> Linear:
        torch.manual_seed(seed)
        return ops.blocks(pack_blocks(random_parts(name, ROWS, COLUMNS), LAYOUTS[name]))

    check(tier, native, make, torch.bfloat16)


def test_tensors_that_lie_in_a_file_are_not_written(tier: WeightTier, tmp_path: Path) -> None:
    """They are read where they are, from files that need not end at a multiple of anything."""
    path = tmp_path / "weights"
    values = {
        layer: torch.randint(0, 255, (1000 + layer,), dtype=torch.uint8) for layer in (0, 2, 4)
    }
    places, content = {}, b""
    for layer, tensor in values.items():
        content += b"x" * 70_016
        places[layer] = FilePlace(path, len(content), len(tensor))
        content += tensor.numpy().tobytes()
    path.write_bytes(content)
    seen: list[Tensor] = []

    def build(views: list[Tensor]) -> Linear:
        seen.extend(views)
        return ReferenceLinear(torch.float32).dense(torch.eye(1))

    for layer, tensor in values.items():
        tier.keep(layer, [torch.zeros_like(tensor)], build, [places[layer]])  # type: ignore[arg-type]
    tier.open()
    tier.begin(1)
    for layer, tensor in values.items():
        tier.enter(layer, 0)
        assert any(torch.equal(view, tensor) for view in seen)
        tier.leave(layer, 0)
    tier.end()
    assert tier.step_bytes % ALIGNMENT == 0 and tier.waited >= 0


def test_layouts_that_only_a_library_knows(tier: WeightTier) -> None:
    base = ReferenceLinear(torch.float32)
    base.dense_layout = "opaque"
    with pytest.raises(ValueError, match="use the native kernels or dtype float32"):
        StreamingLinears(base, torch.float32, tier)
