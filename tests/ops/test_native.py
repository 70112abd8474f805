"""The native kernels of every instruction set of this processor against the references."""

from __future__ import annotations

import gc
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.errors import ConfigurationError
from headrace.ops import extension, reference
from headrace.ops.device import Device
from headrace.ops.host import isa_features
from headrace.ops.linear import Linear, ReferenceLinear, RMSNorm
from headrace.ops.native_linear import NativeLinear, NativeLinearOps, native_rms_norm
from headrace.ops.packed_weight import (
    FORMATS,
    PackedWeight,
    QuantizedWeight,
    WeightFormat,
    pack,
    pack_dense,
    unpack,
)
from headrace.ops.scale_search import native_search_scales, search_scales
from headrace.ops.selection import highest, lowest_kept, native_highest, native_lowest_kept
from headrace.ops.table import make_ops

MODULE = extension.extension()
assert MODULE is not None, "the tests need the native kernels: build the package with a compiler"
ISAS = MODULE.supported_isas()
CPU = Device("cpu", 512, frozenset({"float32", "bfloat16"}))


@pytest.fixture(params=ISAS, scope="module")
def context(request: pytest.FixtureRequest) -> extension._native.Context:
    return MODULE.Context(2, request.param)


def random_weight(rows: int, columns: int, format: WeightFormat, gated: bool) -> PackedWeight:
    """Any values, scales and zero points that the format can hold."""
    if format.bits == 16:
        return pack_dense(torch.randn(rows, columns).bfloat16() / columns**0.5, gated)
    lowest = 1 if format.bits == 8 else 0
    values = torch.randint(lowest, 1 << format.bits, (rows, columns), dtype=torch.uint8)
    groups = -(-columns // (format.group or columns))
    scales = torch.randn(rows, groups).bfloat16().float() / (columns * 4.0**format.bits) ** 0.5
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    return pack(
        QuantizedWeight(values, scales, zeros if format.zero_points else None), format, gated
    )


def expected_product(
    tested: Linear, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """In fp32, of the weight rounded to bfloat16 where the tested product takes that."""
    assert isinstance(tested, NativeLinear)
    ops, bias = ReferenceLinear(torch.float32), None if bias is None else bias.float()
    if tested.in_halves(len(x)) and weight.format.bits == 4:
        rounded = unpack(weight).dequantize(weight.format).bfloat16().float()
        linear = ops.dense(rounded, bias, gated=weight.gated)
    else:
        linear = ops.packed(weight, bias)
    return linear(x.float(), residual=residual.float())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("rows", "columns", "gated"),
    [(16, 32, False), (40, 129, False), (100, 320, True), (258, 200, False), (64, 1100, True)],
)
def test_linear(
    context: extension._native.Context,
    format: WeightFormat,
    rows: int,
    columns: int,
    gated: bool,
) -> None:
    torch.manual_seed(rows)
    weight = random_weight(rows, columns, format, gated)
    width = rows // 2 if gated else rows
    bias, scale = torch.randn(rows).bfloat16(), torch.rand(columns).bfloat16()
    for tokens in (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 31, 33, 97, 130):
        wide = torch.randn(tokens, columns + 7).bfloat16()
        x = wide[:, 3 : columns + 3]
        norm = RMSNorm(scale, 1e-5) if tokens % 2 else None
        residual = torch.randn(tokens, width).bfloat16()
        given_bias = bias if tokens % 3 else None
        linear = NativeLinearOps(context).packed(weight, given_bias)
        found = linear(x, norm=norm, residual=residual, out_dtype=torch.float32)
        # The norm by itself has its own test; a rounding that falls to the other side in it
        # would hide errors of the product.
        normed = x if norm is None else native_rms_norm(context, x, scale, norm.eps)
        expected = expected_product(linear, normed, weight, given_bias, residual)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        rounded = linear(x, norm=norm, residual=residual)
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, found.bfloat16(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("name", ["bf16", "w8a8", "w4a8-g64"])
def test_many_tokens(context: extension._native.Context, name: str) -> None:
    """As many as a step may have at most; the portable kernels would take minutes."""
    tokens = 300 if context.isa in ("portable", "amx_emulated") else 4096
    torch.manual_seed(0)
    weight = random_weight(48, 256, WeightFormat.parse(name), False)
    x = torch.randn(tokens, 256).bfloat16()
    linear = NativeLinearOps(context).packed(weight)
    found = linear(x, out_dtype=torch.float32)
    none = torch.zeros(tokens, 48).bfloat16()
    expected = expected_product(linear, x, weight, None, none)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_tiles_widen_groups(context: extension._native.Context) -> None:
    """Elsewhere a weight with groups meets int8 activations, however many tokens there are."""
    tiles = context.isa in ("amx", "amx_emulated")
    for name, widened in (("bf16", True), ("w8a8", False), ("w4a8-g32", tiles)):
        linear = NativeLinearOps(context).packed(
            random_weight(32, 64, WeightFormat.parse(name), False)
        )
        assert isinstance(linear, NativeLinear)
        assert linear.in_halves(33) == widened
        assert linear.in_halves(32) == (name == "bf16")


@pytest.mark.parametrize("name", ["bf16", "w8a8", "w4a8-g32", "w4a8-g64-zp"])
def test_what_is_not_a_number_stays_in_its_row(
    context: extension._native.Context, name: str
) -> None:
    linear = NativeLinearOps(context).packed(random_weight(32, 96, WeightFormat.parse(name), False))
    x = torch.randn(40, 96).bfloat16()
    clean = linear(x, out_dtype=torch.float32)
    x[3, 5], x[17, 80], x[30, 0] = torch.nan, torch.inf, -torch.inf
    broken = [3, 17, 30]
    found = linear(x, out_dtype=torch.float32)
    others = [row for row in range(40) if row not in broken]
    assert not found[broken].isfinite().any(1).all()
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_rows(context: extension._native.Context, format: WeightFormat) -> None:
    weight = random_weight(100, 130, format, False)
    ids = torch.tensor([0, 99, 17, 17, 16, 15])
    expected = ReferenceLinear(torch.float32).packed(weight).rows(ids)
    found = NativeLinearOps(context).packed(weight).rows(ids)
    assert torch.equal(found, expected.bfloat16())


class TestRefusals:
    """Kernels read memory by address, so what does not fit must not reach them."""

    @staticmethod
    def linear() -> Linear:
        weight = random_weight(32, 64, WeightFormat.parse("w8a8"), False)
        return NativeLinearOps(MODULE.Context(1)).packed(weight)

    @pytest.mark.parametrize("x", [torch.zeros(2, 63).bfloat16(), torch.zeros(2, 64)])
    def test_activations(self, x: Tensor) -> None:
        with pytest.raises(ValueError, match=r"x is .* must be bfloat16 \[tokens, 64\]"):
            self.linear()(x)

    def test_norms(self) -> None:
        with pytest.raises(ValueError, match="norm must be bfloat16"):
            self.linear()(torch.zeros(2, 64).bfloat16(), norm=RMSNorm(torch.ones(64), 1e-5))

    @pytest.mark.parametrize(
        "residual",
        [
            torch.zeros(2, 32),
            torch.zeros(1, 32).bfloat16(),
            torch.zeros(32, 2).bfloat16().t(),
        ],
    )
    def test_residuals(self, residual: Tensor) -> None:
        with pytest.raises(ValueError, match="residual is"):
            self.linear()(torch.zeros(2, 64).bfloat16(), residual=residual)

    @pytest.mark.parametrize("ids", [[32], [-1], [3, 1 << 40]])
    def test_rows_that_are_not_there(self, ids: list[int]) -> None:
        with pytest.raises(IndexError, match="ids"):
            self.linear().rows(torch.tensor(ids))

    def test_ids_of_another_type(self) -> None:
        with pytest.raises(ValueError, match="int64"):
            self.linear().rows(torch.tensor([1], dtype=torch.int32))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(200, 300), (32, 64), (96, 33)])
def test_dense_weights_are_packed_like_the_reference(
    context: extension._native.Context, shape: tuple[int, int], gated: bool
) -> None:
    weight = torch.randn(*shape).bfloat16()
    linear = NativeLinearOps(context).dense(weight, gated=gated)
    assert isinstance(linear, NativeLinear)
    assert torch.equal(linear.weight.values.view(torch.int16), _bits(pack_dense(weight, gated)))


def _bits(weight: PackedWeight) -> Tensor:
    return weight.values.view(torch.int16)


@pytest.mark.parametrize("format", [f for f in FORMATS if f.bits < 16], ids=lambda f: f.name)
def test_scale_search(context: extension._native.Context, format: WeightFormat) -> None:
    """Where two candidates are as good, another order of sums may choose the other."""
    torch.manual_seed(0)
    groups = torch.randn(400, format.group or 200) / 50
    groups[3], groups[4, 5:] = 0, 0
    found, expected = (
        search(groups, format) for search in (partial(native_search_scales, context), search_scales)
    )
    errors = []
    for values, scales, zeros in (found, expected):
        quantized = QuantizedWeight(values, scales[:, None], zeros[:, None])
        errors.append((quantized.dequantize(WeightFormat(format.bits)) - groups).square().sum(1))
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-2, atol=1e-9)
    assert (found[0] == expected[0]).float().mean() > 0.95
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    every = [native_search_scales(MODULE.Context(3, isa), groups, format) for isa in ISAS]
    for other in every:
        assert all(torch.equal(*pair) for pair in zip(other, found, strict=True))
    groups[7, 3] = torch.nan
    assert native_search_scales(context, groups, format)[1].isnan().nonzero().tolist() == [[7]]


def test_highest(context: extension._native.Context) -> None:
    """Rows of one piece and of many; ties, zeros of both signs, nothing finite, NaN."""
    torch.manual_seed(0)
    for rows, width in ((1, 64), (3, 4096), (5, 20032)):
        scores = torch.randn(rows, width)
        cases = [scores, scores.round(), -scores.abs().round(), torch.full_like(scores, -torch.inf)]
        for case in (*cases, scores.masked_fill(scores > 1, torch.inf)):
            values, places = native_highest(context, case)
            expected_values, expected_places = highest(case)
            assert torch.equal(values, expected_values) and torch.equal(places, expected_places)
        for place in (0, width // 2 + 3, width - 1):
            broken = scores.clone()
            broken[-1, place] = -torch.nan
            values, _ = native_highest(context, broken)
            assert values.isnan().flatten().tolist() == [False] * (rows - 1) + [True]
    with pytest.raises(ValueError, match="multiple of 64"):
        native_highest(context, torch.zeros(1, 65))


def test_lowest_kept() -> None:
    """A row alone, many rows, what is out already, more wanted than there is."""
    torch.manual_seed(0)
    context = MODULE.Context(2)
    for rows, width in ((1, 64), (5, 4096), (16, 1280)):
        scores = torch.randn(rows, width).mul_(4)
        scores -= scores.amax(1, keepdim=True)
        scores[:, ::7] = -torch.inf
        scores[0, :9] = scores[0, 9]
        for measures in (scores.exp(), torch.ones_like(scores)):
            shares = torch.linspace(0.001, 1.1, rows, dtype=torch.float64).unsqueeze(1)
            wanted = shares * measures.double().sum(1, keepdim=True)
            expected = lowest_kept(scores, measures, wanted)
            assert torch.equal(native_lowest_kept(context, scores, measures, wanted), expected)


def test_rms_norm(context: extension._native.Context) -> None:
    for shape in ((1, 64), (7, 100), (5, 3, 80)):
        x = torch.randn(*shape[:-1], shape[-1] + 5).bfloat16()[..., : shape[-1]]
        weight = torch.rand(shape[-1]).bfloat16()
        expected = reference.rms_norm(x, weight, 1e-6)
        found = native_rms_norm(context, x, weight, 1e-6)
        # One of both roundings may fall to the other side.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


class TestContext:
    def test_the_best_is_chosen_and_none_is_emulated(self) -> None:
        real = [isa for isa in ISAS if isa != extension.EMULATED]
        assert MODULE.Context(1).isa == real[-1]

    def test_every_instruction_set_of_the_processor_is_there(self) -> None:
        """The processor's flags, read another way, say what the cross-tests must cover."""
        flags = HardwareFlags()
        assert ("avx2" in ISAS) == flags.has("avx2", "fma", "f16c")
        vnni = flags.has("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
        assert ("avx512_vnni" in ISAS) == vnni
        assert ("avx512_bf16" in ISAS) == (vnni and flags.has("avx512_bf16"))
        tiles = vnni and flags.has("avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
        assert ("amx" in ISAS) == tiles

    @pytest.mark.parametrize("isa", ["sse9", "avx", "", "AVX2"])
    def test_an_unknown_one_is_refused(self, isa: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^isa: .*unknown; it runs auto, .*torch$"):
            extension.open_context(isa, 1)

    def test_one_that_the_processor_lacks_is_refused(self) -> None:
        lacking = sorted(set(MODULE.known_isas()) - set(ISAS))
        for isa in lacking:
            with pytest.raises(ConfigurationError, match=f"isa: {isa} is not supported"):
                extension.open_context(isa, 1)

    def test_kernels_that_were_not_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension, "extension", lambda: None)
        assert extension.open_context("auto", 1) is None
        assert extension.supported_isas() == ()
        with pytest.raises(ConfigurationError, match="built without them"):
            extension.open_context("avx2", 1)

    def test_torch_is_an_answer(self) -> None:
        assert extension.open_context(extension.TORCH, 1) is None

    def test_native_kernels_need_bfloat16(self) -> None:
        with pytest.raises(ConfigurationError, match=r"isa: 'avx2'.*bfloat16.*float32"):
            make_ops(CPU, "float32", isa="avx2")
        with pytest.raises(ConfigurationError, match="reference mode"):
            make_ops(CPU, "float32", isa="avx2", batch_invariant=True)

    def test_one_pool_has_the_threads(self) -> None:
        before = torch.get_num_threads()
        try:
            assert make_ops(CPU, "bfloat16", threads=2).isa == MODULE.Context(1).isa
            assert torch.get_num_threads() == 1
            assert make_ops(CPU, "bfloat16", threads=2, isa="torch").isa == "torch"
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


class HardwareFlags:
    """The kernel's list of the processor's features."""

    def __init__(self) -> None:
        self._flags = isa_features()

    def has(self, *names: str) -> bool:
        """Whether all are there."""
        return set(names) <= self._flags


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_agree(threads: int) -> None:
    torch.manual_seed(1)
    weight = random_weight(500, 256, WeightFormat.parse("w4a8-g64"), False)
    x = torch.randn(20, 256).bfloat16()
    alone = NativeLinearOps(MODULE.Context(1)).packed(weight)(x)
    linear = NativeLinearOps(MODULE.Context(threads)).packed(weight)
    for _ in range(50):
        assert torch.equal(linear(x), alone)


def test_callers_of_one_context_take_turns() -> None:
    torch.manual_seed(2)
    linear = NativeLinearOps(MODULE.Context(2)).packed(
        random_weight(300, 512, WeightFormat.parse("w8a8"), False)
    )
    inputs = [torch.randn(count, 512).bfloat16() for count in (1, 7, 40, 3)]
    expected = [linear(x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        results = [linear(inputs[index]) for _ in range(100)]
        wrong.extend(index for found in results if not torch.equal(found, expected[index]))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_contexts_come_and_go() -> None:
    """Threads end with their context."""
    gc.collect()
    before = count_threads()
    for _ in range(20):
        MODULE.Context(4)
    gc.collect()
    assert count_threads() <= before


def count_threads() -> int:
    """Threads of this process, those that Python does not know of included."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_limits_can_be_measured(context: extension._native.Context) -> None:
    """Operations are counted in full, whatever the instruction set."""
    for kind in ("int8", "bf16"):
        assert context.peak(kind, 2) > 1e4
    data = torch.ones(1 << 16, dtype=torch.uint8)
    context.read(data.data_ptr(), data.nbytes)
