"""Attention to coded units: native kernels of every instruction set against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, CodedPlace, CodedUnit, KVCodec
from headrace.contracts.method import MethodCard
from headrace.kv.packed_bits import BITS, decode_lines
from headrace.ops import extension
from headrace.ops.coded_attention import CodedAttention, CodedRows, NativeCodedAttention
from headrace.ops.paged import AttentionSpec

MODULE = extension.extension()
assert MODULE is not None, "the tests need the native kernels: build the package with a compiler"
PAGE_BYTES = 1 << 15


@pytest.fixture(params=MODULE.supported_isas(), scope="module")
def native(request: pytest.FixtureRequest) -> NativeCodedAttention:
    assert MODULE is not None
    return NativeCodedAttention(MODULE.Context(2, request.param))


@dataclass(frozen=True, slots=True)
class Lines(KVCodec):
    """A codec of any parts that lines of levels can have.

    Args:
        group: entries that share a step; 0: all of a line.
        described: whether kernels may know.
    """

    card: ClassVar[MethodCard] = MethodCard(title="", summary="", guarantee="lossy")

    bits: int = 4
    group: int = 0
    rank: int = 2
    kept: int = 2
    described: bool = True

    def unit_slots(self, block_size: int) -> int:
        raise NotImplementedError

    def parts(self, heads: int, unit: int, width: int) -> tuple[CodedPart, ...]:
        found = []
        for name, lines, length in (("key", width, unit), ("value", unit, width)):
            group = self.group or length
            shape = (heads, lines, length // group)
            found += [
                CodedPart(f"{name}_levels", (*shape, group * self.bits // 8), "uint8"),
                CodedPart(f"{name}_steps", (*shape, 2), "float16"),
                CodedPart(f"{name}_left", (heads, lines, self.rank), "float16"),
                CodedPart(f"{name}_right", (heads, self.rank, length), "float16"),
                CodedPart(f"{name}_places", (heads, lines, self.kept), "int16"),
                CodedPart(f"{name}_outliers", (heads, lines, self.kept), "float16"),
            ]
        return tuple(part for part in found if 0 not in part.shape)

    def encode(self, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decode_lines(parts, self.bits)

    def level_bits(self) -> int | None:
        return self.bits if self.described else None


@dataclass(frozen=True)
class Case:
    """Rows that attend to units of random parts.

    Args:
        rows: queries and units of each; 0 units: a row beside them that has none.
    """

    codec: Lines
    slots: int = 32
    width: int = 32
    heads: int = 2
    ratio: int = 2
    rows: tuple[tuple[int, int], ...] = ((1, 1),)
    softcap: float | None = None

    def random_part(self, part: CodedPart, length: int) -> Tensor:
        if part.dtype == "uint8":
            return torch.randint(0, 256, part.shape, dtype=torch.uint8)
        if part.dtype == "int16":
            places = torch.rand(*part.shape[:-1], length).argsort(-1)
            return places[..., : part.shape[-1]].to(torch.int16)
        step = 2.0 / 2**self.codec.bits
        return (torch.randn(part.shape) * (step if part.name.endswith("steps") else 0.5)).half()

    def fill(self, units: int) -> tuple[Tensor, CodedUnit, list[list[int]]]:
        """Pages of random parts, half of which nobody reads, and those of each unit."""
        places: list[CodedPlace] = []
        page = used = 0
        for part in self.codec.parts(self.heads, self.slots, self.width):
            assert part.num_bytes <= PAGE_BYTES
            if used + part.num_bytes > PAGE_BYTES:
                page, used = page + 1, 0
            places.append(CodedPlace(part, page, used))
            used += part.num_bytes
        unit = CodedUnit(self.slots, page + 1, {3: places})
        pages = torch.randint(0, 256, (2 * units * unit.pages, PAGE_BYTES), dtype=torch.uint8)
        table = torch.randperm(len(pages))[: units * unit.pages].view(units, -1).tolist()
        for row in table:
            for place in places:
                length = self.slots if place.part.name.startswith("key") else self.width
                held = self.random_part(place.part, length).view(torch.uint8).flatten()
                pages[row[place.page], place.offset : place.offset + len(held)] = held
        return pages, unit, table

    def run(self, *versions: CodedAttention) -> list[tuple[Tensor, Tensor]]:
        """What each version makes of one and the same."""
        torch.manual_seed(1)
        tokens = sum(queries for queries, _ in self.rows)
        pages, unit, table = self.fill(sum(units for _, units in self.rows))
        heads = self.heads * self.ratio
        # Entries of a wider projection, as a model has them.
        q = torch.randn(tokens, heads + 2, self.width).bfloat16()[:, :heads]
        angle = torch.rand(tokens, self.width // 2) * 6
        angles = (angle.cos().bfloat16(), angle.sin().bfloat16())
        own = (torch.randn(tokens, heads, self.width).bfloat16(), torch.randn(tokens, heads))
        spec = AttentionSpec(self.width**-0.5, softcap=self.softcap)
        found = []
        for version in versions:
            rows, start, first = CodedRows(self.codec, unit, [], [], []), 0, 0
            for queries, units in self.rows:
                if units:
                    rows.starts.append(start)
                    rows.queries.append(queries)
                    rows.pages.append(np.array(table[first : first + units], dtype=np.int32))
                start, first = start + queries, first + units
            result = (own[0].clone(), own[1].clone())
            version.attend(pages, 3, rows, q, angles, result, spec)
            start = 0
            for queries, units in self.rows:
                if not units:
                    inputs = slice(start, start + queries)
                    assert torch.equal(result[0][inputs], own[0][inputs])
                    assert torch.equal(result[1][inputs], own[1][inputs])
                start += queries
            found.append(result)
        return found

    def check(self, native: NativeCodedAttention) -> None:
        (out, lse), (wanted, wanted_lse) = self.run(native, CodedAttention())
        torch.testing.assert_close(out.float(), wanted.float(), rtol=2**-6, atol=2e-2)
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-2, atol=2e-2)


PLAIN = Lines(rank=0, kept=0)
CASES = [
    *(Case(Lines(bits=bits, rank=0, kept=0)) for bits in BITS),
    *(Case(Lines(bits=bits, group=16)) for bits in BITS),
    *(Case(Lines(bits=bits, group=8), width=40, slots=24) for bits in BITS),
    Case(Lines(bits=4, group=4, rank=0), width=12, slots=20),
    Case(Lines(bits=8, rank=3, kept=5), width=34, slots=9),
    Case(Lines(bits=4, rank=1, kept=1), width=6, slots=2, ratio=1),
    Case(Lines(bits=2, rank=64, kept=0), width=64, slots=96),
    Case(Lines(bits=4), width=64, slots=128, heads=8, ratio=4, rows=((1, 9),)),
    Case(Lines(bits=4), width=128, slots=100, ratio=3, rows=((70, 3), (2, 0), (1, 5), (5, 1))),
    Case(Lines(bits=2, group=32, rank=0, kept=0), width=64, slots=320, ratio=8, rows=((130, 2),)),
    Case(PLAIN, softcap=2.0, rows=((4, 3),)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree(case: Case, native: NativeCodedAttention) -> None:
    case.check(native)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data: Any, native: NativeCodedAttention) -> None:
    bits = data.draw(st.sampled_from(BITS))
    group = data.draw(st.sampled_from((0, 8, 16, 24)))
    step = group or 8 // min(bits, 4)
    slots, width = (data.draw(st.integers(1, 90 // step)) * step for _ in range(2))
    codec = Lines(bits, group, data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2)))
    row = st.tuples(st.integers(1, 9), st.integers(0, 4))
    rows = [*data.draw(st.lists(row, max_size=3)), (1, 1)]
    heads, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    Case(codec, slots, width, heads, ratio, tuple(rows)).check(native)


@pytest.mark.parametrize(
    "case",
    [
        Case(Lines(described=False)),
        Case(Lines(bits=8, rank=0, kept=0), width=1028, slots=8, heads=1),
        Case(Lines(bits=8, rank=70, kept=0)),
    ],
    ids=("undeclared", "wide", "rank"),
)
def test_what_kernels_do_not_take_goes_to_the_reference(
    case: Case, native: NativeCodedAttention
) -> None:
    (out, lse), (wanted, wanted_lse) = case.run(native, CodedAttention())
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_the_reference_attends_to_what_is_decoded() -> None:
    case = Case(Lines(), rows=((3, 2),))
    torch.manual_seed(1)
    pages, unit, table = case.fill(2)
    [(out, lse)] = case.run(CodedAttention())
    torch.manual_seed(1)
    case.fill(2)
    q = torch.randn(3, 6, 32).bfloat16()[:, :4]
    angle = torch.rand(3, 16) * 6
    cos, sin = (part.bfloat16().double()[:, None] for part in (angle.cos(), angle.sin()))
    own, own_lse = torch.randn(3, 4, 32).bfloat16().double(), torch.randn(3, 4).double()
    a, b = q.double().chunk(2, -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    parts = {}
    for place in unit.places[3]:
        held = [
            pages[row[place.page], place.offset :].view(getattr(torch, place.part.dtype))
            for row in table
        ]
        count = int(np.prod(place.part.shape))
        parts[place.part.name] = torch.stack([x[:count].view(place.part.shape) for x in held])
    keys, values = (
        x.double().transpose(0, 1).flatten(1, 2).repeat_interleave(2, 0)
        for x in decode_lines(parts, 4)
    )
    scores = torch.einsum("qhd,hsd->qhs", turned, keys) * 32**-0.5
    total = torch.logaddexp(scores.logsumexp(-1), own_lse)
    seen = torch.einsum("qhs,hsd->qhd", (scores - total[..., None]).exp(), values)
    wanted = seen + own * (own_lse - total).exp()[..., None]
    torch.testing.assert_close(out.double(), wanted, rtol=2**-6, atol=2e-2)
    torch.testing.assert_close(lse.double(), total, rtol=1e-2, atol=1e-2)


def test_parts_that_do_not_fit_are_refused(native: NativeCodedAttention) -> None:
    @dataclass(frozen=True, slots=True)
    class Wrong(Lines):
        def level_bits(self) -> int | None:
            return 2

    with pytest.raises(ValueError, match="key_levels: must be 512 items of uint8"):
        Case(Wrong()).run(native)
    with pytest.raises(ValueError, match="do not fit heads of 32 in bfloat16"):
        _with_queries(native, replace(Case(PLAIN), width=32), torch.float32)


def _with_queries(native: NativeCodedAttention, case: Case, dtype: torch.dtype) -> None:
    pages, unit, table = case.fill(1)
    rows = CodedRows(case.codec, unit, [0], [1], [np.array(table, dtype=np.int32)])
    q = torch.zeros(1, 4, case.width, dtype=dtype)
    angles = (torch.zeros(1, case.width // 2), torch.zeros(1, case.width // 2))
    native.attend(pages, 3, rows, q, angles, (q.clone(), torch.zeros(1, 4)), AttentionSpec(1.0))
