"""Every version of every operation in the table against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headrace.ops import reference
from headrace.ops.attention import PagedAttention
from headrace.ops.device import DTYPES, Device
from headrace.ops.extension import TORCH
from headrace.ops.paged import AttentionSpec
from headrace.ops.table import VERSIONS, make_ops
from tests.ops.attention_cases import CASES as ATTENTION_CASES
from tests.ops.attention_cases import GROUPED_CASES, AttentionCase
from tests.ops.function_cases import FUNCTION_CASES, TOLERANCES, normal


def test_every_operation_has_cases() -> None:
    assert {*FUNCTION_CASES, "linear", "neurons", "attention"} == VERSIONS.keys()
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


DENSE = ("matmul", "flash")
FLOATS = [case for case in ATTENTION_CASES if case.dtype == torch.float32]


@pytest.mark.parametrize("version", DENSE)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_agrees(case: AttentionCase, version: str) -> None:
    found = case.run(VERSIONS["attention"][version])
    # Half-precision kernels may approximate the exponential, but not round what they sum; they do
    # round what a scale makes of int8.
    halves = 2**-6 if case.cache == "int8" else 2e-4
    error = 1e-5 if case.dtype == torch.float32 else halves
    expected = case.run(VERSIONS["attention"]["reference"])
    allowed = TOLERANCES[case.dtype]
    found.assert_close(expected, {**allowed, "atol": max(error, allowed["atol"])}, error)


@pytest.mark.parametrize("case", FLOATS + GROUPED_CASES, ids=str)
def test_the_reference_is_attention(case: AttentionCase) -> None:
    """What follows a context in its last page is NaN, and is not read."""
    found = case.run(VERSIONS["attention"]["reference"], blank=False, sums=True)
    out, log_sum_exp, sums = case.by_definition()
    # Rounding to int8 moves a key or value by up to 1/254 of its largest element.
    error = 0.05 if case.cache == "int8" else 1e-5
    torch.testing.assert_close(found.out.double(), out, rtol=1e-5, atol=error)
    torch.testing.assert_close(found.log_sum_exp.double(), log_sum_exp, rtol=1e-5, atol=error)
    assert found.sums is not None
    torch.testing.assert_close(found.sums.double(), sums, rtol=1e-5, atol=4 * error)


PAST_CASES = [part for case in ATTENTION_CASES if (part := case.behind_a_past) is not None]


@pytest.mark.parametrize("case", PAST_CASES, ids=str)
def test_the_past_is_attended_to_alone(case: AttentionCase) -> None:
    expected = case.read_past(VERSIONS["attention"]["reference"])
    if case.dtype == torch.float32:
        out, log_sum_exp = case.past_by_definition()
        error = 0.05 if case.cache == "int8" else 1e-5
        torch.testing.assert_close(expected.out.double(), out, rtol=1e-5, atol=error)
        torch.testing.assert_close(
            expected.log_sum_exp.double(), log_sum_exp, rtol=1e-5, atol=error
        )
    halves = 2**-6 if case.cache == "int8" else 2e-4
    error = 1e-5 if case.dtype == torch.float32 else halves
    allowed = TOLERANCES[case.dtype]
    for version in DENSE:
        found = case.read_past(VERSIONS["attention"][version])
        found.assert_close(expected, {**allowed, "atol": max(error, allowed["atol"])}, error)


def test_parts_are_merged() -> None:
    """One by one, or all at once; queries have none, one or more of them."""
    torch.manual_seed(0)
    owners = torch.tensor([0, 2, 2, 0, 3, 2])
    out, outs = torch.randn(4, 3, 8), torch.randn(6, 3, 8)
    lse, lses = torch.randn(4, 3) * 20, torch.randn(6, 3) * 20
    found, both = reference.merge_parts(out, lse, outs, lses, owners)
    for part, owner in enumerate(owners.tolist()):
        merged = reference.merge_attention(out[owner], lse[owner], outs[part], lses[part])
        out[owner], lse[owner] = merged
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(both, lse)


@pytest.mark.parametrize("case", [c for c in FLOATS if c.block_size == 16], ids=str)
def test_long_chunks_go_in_parts(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.run(VERSIONS["attention"]["matmul"])
    monkeypatch.setattr("headrace.ops.attention._SCORES_AT_ONCE", 9_000)
    parts = case.run(VERSIONS["attention"]["matmul"])
    torch.testing.assert_close(whole.out, parts.out, **TOLERANCES[case.dtype])
    torch.testing.assert_close(whole.log_sum_exp, parts.log_sum_exp, **TOLERANCES[case.dtype])


@pytest.mark.parametrize("version", DENSE)
class TestRefusals:
    """Dense kernels say what they do not do."""

    def test_groups(self, version: str) -> None:
        case = next(case for case in GROUPED_CASES if case.groups > 1)
        with pytest.raises(ValueError, match="one page table"):
            case.run(VERSIONS["attention"][version])

    def test_score_sums(self, version: str) -> None:
        with pytest.raises(ValueError, match="sum scores"):
            FLOATS[0].run(VERSIONS["attention"][version], sums=True)


class TestMergeAttention:
    """Keys may be split anywhere, and the parts attended in any order."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One query ``[1, heads, width]`` and all keys ``[S, width]``."""
        return reference.attend_densely(q, k, v, AttentionSpec(q.shape[-1] ** -0.5))[:2]

    @pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
    @pytest.mark.parametrize("heads", [1, 6])
    def test_split_anywhere(self, spread: float, heads: int) -> None:
        torch.manual_seed(1)
        q = normal(1, heads, 16, dtype=torch.float32, spread=spread)
        k, v = (normal(23, 16, dtype=torch.float32) for _ in range(2))
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
        k, v = (normal(60, 32, dtype=torch.float32) for _ in range(2))
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
        device = Device(name, 64, frozenset(DTYPES))
        ops = make_ops(device, dtype, batch_invariant=batch_invariant, isa=TORCH)
        assert (ops.device, ops.dtype, ops.isa) == (name, DTYPES[dtype], TORCH)
        version = "reference" if batch_invariant or name != "cpu" else "torch_cpu"
        assert ops.rms_norm == VERSIONS["rms_norm"][version]
        assert type(ops.linears) is VERSIONS["linear"][version]
        assert isinstance(ops.attention, PagedAttention) != batch_invariant
