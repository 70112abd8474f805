"""Native attention of every instruction set of this processor against the reference."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.contracts.cache import attention_layout
from headrace.kv.arena import KVArena
from headrace.ops import extension
from headrace.ops.attention import PagedAttention, flash_kernel
from headrace.ops.chosen_attention import ChosenAttention
from headrace.ops.native_attention import NativeAttention
from headrace.ops.paged import AttentionSpec, LayerCache, PagedPlane, StepShape
from headrace.ops.reference import ReferenceAttention
from tests.ops.attention_cases import NATIVE_CASES, AttentionCase, Outcome
from tests.ops.function_cases import TOLERANCES

MODULE = extension.extension()
assert MODULE is not None, "the tests need the native kernels: build the package with a compiler"
ISAS = MODULE.supported_isas()
HALF = torch.bfloat16

Make = Callable[[str, torch.dtype], NativeAttention]


@functools.cache
def make_context(isa: str, threads: int) -> extension._native.Context:
    assert MODULE is not None
    return MODULE.Context(threads, isa)


def maker(isa: str, threads: int = 2) -> Make:
    return lambda device, dtype: NativeAttention(make_context(isa, threads))


@functools.cache
def expected(case: AttentionCase) -> Outcome:
    return case.run(lambda device, dtype: ReferenceAttention(device), blank=False, sums=True)


def assert_right(found: Outcome, case: AttentionCase) -> None:
    """int8: queries are rounded to 16 bits where the instruction set multiplies bytes."""
    wanted = expected(case)
    found.assert_close(wanted, TOLERANCES[HALF], 1e-3 if case.cache == "int8" else 1e-4)
    assert found.sums is not None and wanted.sums is not None
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_agrees(case: AttentionCase, isa: str) -> None:
    """What follows a context in its last page is NaN, and is not read."""
    assert_right(case.run(maker(isa), blank=False, sums=True), case)


def test_the_past_is_read_by_another_version() -> None:
    """It writes whatever it is given; the next version reads what it wrote."""

    def choose(device: str, dtype: torch.dtype) -> ChosenAttention:
        dense = PagedAttention(flash_kernel, device, dtype)
        return ChosenAttention([maker(ISAS[-1])(device, dtype), dense])

    case = next(part for case in NATIVE_CASES if (part := case.behind_a_past) is not None)
    with pytest.raises(ValueError, match="always writes"):
        case.read_past(maker(ISAS[-1]))
    wanted = case.read_past(lambda device, dtype: ReferenceAttention(device))
    case.read_past(choose).assert_close(wanted, TOLERANCES[HALF], 2e-4)


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("case", NATIVE_CASES[-10:], ids=str)
def test_any_number_of_threads(case: AttentionCase, threads: int) -> None:
    """Keys are split among more threads, and not at all for one."""
    assert_right(case.run(maker(ISAS[-1], threads), blank=False, sums=True), case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", ["", "int8"])
@pytest.mark.parametrize("rows", [((1, 40), (1, 700), (1, 9)), ((30, 5), (70, 0), (3, 9))])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_stays_in_its_row(
    part: str, rows: tuple[tuple[int, int], ...], cache: str, isa: str
) -> None:
    case = AttentionCase("nan", rows, 4, 2, 64, 16, HALF, cache=cache)
    clean = case.run(maker(isa))
    start, end = rows[0][0], rows[0][0] + rows[1][0]
    heads = {"q": slice(0, 4), "k": slice(4, 6), "v": slice(6, 8)}[part]
    case.qkv[end - 1, heads, 7] = torch.nan
    found = case.run(maker(isa))
    assert found.out[end - 1].isnan().any(dim=-1).all()
    others = [*range(start), *range(end, len(clean.out))]
    assert torch.equal(found.out[others], clean.out[others])
    assert torch.equal(found.log_sum_exp[others], clean.log_sum_exp[others])


class TestRefusals:
    """Memory is reached by address: what does not fit is refused before."""

    @pytest.fixture
    def attention(self) -> NativeAttention:
        return NativeAttention(make_context("auto", 1))

    @pytest.fixture
    def cache(self) -> LayerCache:
        return self.arena().cache(0)

    @staticmethod
    def arena(dtype: str = "bfloat16", head_dim: int = 8) -> KVArena:
        layout = attention_layout(
            layers=1, kv_heads=2, head_dim=head_dim, dtype=dtype, block_size=4
        )
        return KVArena(layout, 3, "cpu")

    @staticmethod
    def shape(kv_heads: int = 2) -> StepShape:
        one = torch.ones(1, dtype=torch.int64).numpy()
        tables = torch.tensor([[0, 1]], dtype=torch.int32).numpy()
        return StepShape.of_one_group(one * 3, one * 2, tables, kv_heads)

    def arguments(self, **changed: Tensor) -> list[Tensor]:
        tensors = {
            "q": torch.zeros(3, 4, 8, dtype=HALF),
            "k": torch.zeros(3, 2, 8, dtype=HALF),
            "v": torch.zeros(3, 2, 8, dtype=HALF),
            "cos": torch.zeros(3, 4, dtype=HALF),
            "sin": torch.zeros(3, 4, dtype=HALF),
        }
        return list({**tensors, **changed}.values())

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("q", torch.zeros(2, 4, 8, dtype=HALF)),
            ("q", torch.zeros(3, 4, 10, dtype=HALF)),
            ("q", torch.zeros(3, 5, 8, dtype=HALF)),
            ("q", torch.zeros(3, 4, 8)),
            ("q", torch.zeros(3, 8, 4, dtype=HALF).transpose(1, 2)),
            ("k", torch.zeros(3, 1, 8, dtype=HALF)),
            ("v", torch.zeros(4, 2, 8, dtype=HALF)),
            ("cos", torch.zeros(3, 8, dtype=HALF)),
            ("cos", torch.zeros(4, 3, dtype=HALF).T),
            ("sin", torch.zeros(3, 4)),
        ],
    )
    def test_tensors(
        self, attention: NativeAttention, cache: LayerCache, name: str, tensor: Tensor
    ) -> None:
        plan = attention.plan(self.shape(), cache.keys)
        attention.attend(*self.arguments(), cache, AttentionSpec(1.0), plan)
        with pytest.raises(ValueError, match=r"native attention|multiple of the KV heads"):
            attention.attend(*self.arguments(**{name: tensor}), cache, AttentionSpec(1.0), plan)

    @pytest.mark.parametrize(
        "sums",
        [torch.zeros(2, 4), torch.zeros(1, 5), torch.zeros(2, 5).half(), torch.zeros(5, 2).T],
    )
    def test_score_sums(self, attention: NativeAttention, cache: LayerCache, sums: Tensor) -> None:
        plan = attention.plan(self.shape(), cache.keys)
        with pytest.raises(ValueError, match="score_sums"):
            attention.attend(*self.arguments(), cache, AttentionSpec(1.0), plan, sums)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"past": [[6]]}, "too few pages"),
            ({"past": [[-1]]}, "too few pages"),
            ({"lengths": [0]}, "needs a query"),
            ({"head_group": [0, 1]}, "no such group"),
        ],
    )
    def test_steps(
        self,
        attention: NativeAttention,
        cache: LayerCache,
        changed: dict[str, list[int]],
        message: str,
    ) -> None:
        arrays = {name: torch.tensor(value).numpy() for name, value in changed.items()}
        with pytest.raises(ValueError, match=message):
            attention.plan(dataclasses.replace(self.shape(), **arrays), cache.keys)

    def test_a_plan_of_other_heads(self, attention: NativeAttention, cache: LayerCache) -> None:
        plan = attention.plan(self.shape(kv_heads=3), cache.keys)
        with pytest.raises(ValueError, match="number of KV heads"):
            attention.attend(*self.arguments(), cache, AttentionSpec(1.0), plan)

    def test_a_plan_of_other_pages(self, attention: NativeAttention, cache: LayerCache) -> None:
        other = dataclasses.replace(
            cache,
            keys=PagedPlane(cache.keys.pages, cache.keys.offsets, 8, 8, HALF),
        )
        plan = attention.plan(self.shape(), other.keys)
        with pytest.raises(ValueError, match="block size"):
            attention.attend(*self.arguments(), cache, AttentionSpec(1.0), plan)

    @pytest.mark.parametrize(
        ("dtype", "head_dim", "message"),
        [
            ("float32", 8, "bfloat16"),
            ("float16", 8, "bfloat16"),
            ("bfloat16", 7, "fit a step"),
            ("bfloat16", 514, "fit a step"),
        ],
    )
    def test_caches(
        self, attention: NativeAttention, dtype: str, head_dim: int, message: str
    ) -> None:
        cache = self.arena(dtype, head_dim).cache(0)
        plan = attention.plan(self.shape(), cache.keys)
        with pytest.raises(ValueError, match=message):
            attention.attend(*self.arguments(), cache, AttentionSpec(1.0), plan)

    @pytest.mark.parametrize("head_dim", [7, 514])
    def test_widths(self, attention: NativeAttention, head_dim: int) -> None:
        cache = self.arena(head_dim=head_dim).cache(0)
        tensors = [torch.zeros(3, n, head_dim, dtype=HALF) for n in (4, 2, 2)]
        tensors += [torch.zeros(3, head_dim // 2, dtype=HALF)] * 2
        plan = attention.plan(self.shape(), cache.keys)
        with pytest.raises(ValueError, match="width: must be even"):
            attention.attend(*tensors, cache, AttentionSpec(1.0), plan)
