"""Every version of every operation in the table against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from headrace.ops import reference
from headrace.ops.attention import PagedAttention
from headrace.ops.device import DTYPES, Device
from headrace.ops.table import VERSIONS, Ops, make_ops
from tests.ops.attention_cases import CASES as ATTENTION_CASES
from tests.ops.attention_cases import AttentionCase
from tests.ops.function_cases import FUNCTION_CASES, TOLERANCES, normal


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are small here: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_operation_has_cases() -> None:
    assert {*FUNCTION_CASES, "attention"} == VERSIONS.keys()
    assert all("reference" in versions for versions in VERSIONS.values())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("operation", "version"),
    [(operation, version) for operation in FUNCTION_CASES for version in VERSIONS[operation]],
)
def test_functions_agree(operation: str, version: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tested, expected = (VERSIONS[operation][name] for name in (version, "reference"))
    for arguments in FUNCTION_CASES[operation](dtype):
        before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        result = tested(*arguments)
        assert isinstance(result, Tensor) and result.dtype == dtype
        torch.testing.assert_close(result, expected(*arguments), **TOLERANCES[dtype])
        torch.testing.assert_close(arguments, tuple(before), rtol=0, atol=0)


@pytest.mark.parametrize("version", [v for v in VERSIONS["attention"] if v != "reference"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_agrees(case: AttentionCase, version: str) -> None:
    out, log_sum_exp, written = case.run(VERSIONS["attention"][version])
    expected = case.run(VERSIONS["attention"]["reference"])
    assert out.dtype == case.dtype and log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(out, expected[0], **TOLERANCES[case.dtype])
    # Half-precision kernels may approximate the exponential, but not round what they sum.
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-4
    torch.testing.assert_close(log_sum_exp, expected[1], rtol=1e-5, atol=tolerance)
    assert torch.equal(written, expected[2])


@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.dtype == torch.float32], ids=str)
def test_the_reference_is_attention(case: AttentionCase) -> None:
    out, log_sum_exp, _ = case.run(VERSIONS["attention"]["reference"])
    expected_out, expected_lse = case.by_definition()
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_sum_exp.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in ATTENTION_CASES if c.dtype == torch.float32 and c.block_size == 16], ids=str
)
def test_long_chunks_go_in_parts(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.run(VERSIONS["attention"]["matmul"])
    monkeypatch.setattr("headrace.ops.attention._SCORES_AT_ONCE", 9_000)
    parts = case.run(VERSIONS["attention"]["matmul"])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCES[case.dtype])


class TestMergeAttention:
    """Keys may be split anywhere, and the parts attended in any order."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One query ``[1, heads, width]`` and all keys ``[S, heads, width]``."""
        return reference.attend_causally(q, k, v, q.shape[-1] ** -0.5)

    @pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
    @pytest.mark.parametrize("heads", [(1, 1), (6, 3)])
    def test_split_anywhere(self, spread: float, heads: tuple[int, int]) -> None:
        torch.manual_seed(1)
        q = normal(1, heads[0], 16, dtype=torch.float32, spread=spread)
        k, v = (normal(23, heads[1], 16, dtype=torch.float32) for _ in range(2))
        whole = self.attend(q, k, v)
        for cut in range(1, 23):
            a, b = self.attend(q, k[:cut], v[:cut]), self.attend(q, k[cut:], v[cut:])
            for merged in (
                reference.merge_attention(*a, *b),
                reference.merge_attention(*b, *a),
            ):
                torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)

    def test_many_parts_in_any_order(self) -> None:
        torch.manual_seed(2)
        q = normal(1, 4, 32, dtype=torch.float32, spread=3.0)
        k, v = (normal(60, 2, 32, dtype=torch.float32) for _ in range(2))
        whole = self.attend(q, k, v)
        for _ in range(10):
            parts = [
                self.attend(q, a, b)
                for a, b in zip(k.split([1, 9, 20, 3, 27]), v.split([1, 9, 20, 3, 27]), strict=True)
            ]
            merged = parts.pop()
            for index in torch.randperm(4).tolist():
                merged = reference.merge_attention(*parts[index], *merged)
            torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)

    def test_one_side_decides(self) -> None:
        out_a, out_b = torch.ones(1, 2, 8), torch.full((1, 2, 8), 5.0)
        for low in (-300.0, -1e30, -math.inf):
            lse_a, lse_b = torch.zeros(1, 2), torch.full((1, 2), low)
            out, lse = reference.merge_attention(out_a, lse_a, out_b, lse_b)
            assert torch.equal(out, out_a) and torch.equal(lse, lse_a)

    def test_halves_are_merged_in_full_precision(self) -> None:
        out = torch.tensor([[[1.0, 3.0]]], dtype=torch.bfloat16)
        lse = torch.zeros(1, 1)
        merged, both = reference.merge_attention(out, lse, out + 1, lse + math.log(3))
        assert merged.dtype == torch.bfloat16
        assert merged.tolist() == [[[1.75, 3.75]]]
        torch.testing.assert_close(both, torch.full((1, 1), math.log(4)))


class TestChoice:
    """What ``make_ops`` gives a device comes out of the table."""

    @pytest.mark.parametrize("batch_invariant", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["cpu", "meta"])
    def test_from_the_table(self, name: str, dtype: str, batch_invariant: bool) -> None:
        ops = make_ops(Device(name, 64, frozenset(DTYPES)), dtype, batch_invariant=batch_invariant)
        assert ops.device == name and ops.dtype == DTYPES[dtype]
        chosen = {f.name for f in fields(Ops)} - {
            "device",
            "dtype",
            "batch_invariant",
            "pack_weight",
            "linear",
            "attention",
        }
        assert chosen == VERSIONS.keys() - {"linear", "attention"}
        for operation in chosen:
            versions = VERSIONS[operation]
            allowed = ["reference"] if batch_invariant or name != "cpu" else list(versions)
            assert getattr(ops, operation) in [versions[version] for version in allowed]
        assert isinstance(ops.attention, PagedAttention) != batch_invariant

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linear_takes_what_pack_weight_makes(self, dtype: str) -> None:
        torch.manual_seed(3)
        ops = make_ops(Device("cpu", 64, frozenset(DTYPES)), dtype)
        x, weight = (normal(*size, dtype=ops.dtype) for size in ((5, 40), (24, 40)))
        expected = reference.linear(x, weight, None)
        packed = ops.pack_weight(weight)
        torch.testing.assert_close(ops.linear(x, packed, None), expected, rtol=2**-7, atol=2**-7)

    def test_without_bf16_products_weights_stay_unpacked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("headrace.ops.torch_cpu.packs_weights", lambda: False)
        ops = make_ops(Device("cpu", 64, frozenset()), "bfloat16")
        assert ops.linear is reference.linear
        assert ops.pack_weight is reference.pack_weight
