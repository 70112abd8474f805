"""Products with some neurons on the native kernels of every instruction set of this processor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops import extension, reference
from headrace.ops.linear import RMSNorm
from headrace.ops.native_linear import native_rms_norm
from headrace.ops.native_neurons import NativeNeurons, native_neurons
from headrace.ops.neurons import GatheredNeurons, NeuronTensors, ReferenceNeurons
from tests.ops.neuron_cases import CASES, NeuronCase, gelu_tanh

MODULE = extension.extension()
assert MODULE is not None, "the tests need the native kernels: build the package with a compiler"
HALF = torch.bfloat16
WIDE = NeuronCase(900, 1100, F.silu, True)
WIDE_INT8 = NeuronCase(900, 1100, F.silu, False, quantized=True)


@pytest.fixture(params=MODULE.supported_isas(), scope="module")
def context(request: pytest.FixtureRequest) -> extension._native.Context:
    return MODULE.Context(2, request.param)


def in_float(tensors: NeuronTensors) -> ReferenceNeurons:
    """The reference in fp32, of the same weights."""
    weight = tensors.weight.float()
    return ReferenceNeurons(replace(tensors, weight=weight), reference.rms_norm)


@pytest.mark.parametrize(
    "case", [*(case for case in CASES if case.activation is F.silu), WIDE, WIDE_INT8], ids=str
)
def test_products(context: extension._native.Context, case: NeuronCase) -> None:
    tensors = case.tensors(HALF)
    tested, expected = NativeNeurons(context, tensors), in_float(tensors)
    for x, chosen, options in case.calls(HALF):
        found = tested(x, chosen, **options)
        assert found.dtype == HALF
        norm, residual = options["norm"], options["residual"]
        # Rounded where the kernels round: the norm, and the result.
        normed = x if norm is None else native_rms_norm(context, x, norm.weight, norm.eps)
        added = None if residual is None else residual.float()
        wanted = expected(normed.float(), chosen, residual=added)
        torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("case", [WIDE, WIDE_INT8], ids=str)
def test_rows_do_not_mix(context: extension._native.Context, case: NeuronCase) -> None:
    """More rows than go at once, of which some are no numbers and some go through nothing."""
    tensors = case.tensors(HALF)
    product = NativeNeurons(context, tensors)
    x, chosen = torch.randn(19, case.hidden).to(HALF), case.subsets(19)
    clean = product(x, chosen)
    bias = torch.zeros(case.hidden) if tensors.bias is None else tensors.bias
    assert torch.equal(clean[4].float(), bias.to(HALF).float())
    broken = [2, 11, 18]
    for row, value in zip(broken, (torch.nan, torch.inf, torch.nan), strict=True):
        x[row, row] = value
    found = product(x, chosen)
    rest = [row for row in range(19) if row not in broken]
    assert torch.equal(found[rest], clean[rest])
    assert not found[broken].isfinite().all(1).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_neurons_reach_those_that_go_through_them(
    context: extension._native.Context, value: float
) -> None:
    """In columns as well: nothing is multiplied by 0 to leave it out."""
    tensors = NeuronCase(40, 131, F.silu, True).tensors(HALF)
    chosen = torch.tensor([[0, 1, 3, -1], [1, 2, 3, 4], [5, 6, 7, 39]], dtype=torch.int32)
    x = torch.randn(3, 131).to(HALF)
    clean = NativeNeurons(context, tensors)(x, chosen)
    tensors.weight[2, :, 130] = value
    found = NativeNeurons(context, tensors)(x, chosen)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert not found[1, 130].isfinite()


def test_inputs_of_any_size(context: extension._native.Context) -> None:
    """Zeros, and what bf16 has next to infinity and to 0."""
    for case in (WIDE, WIDE_INT8):
        tensors = replace(case.tensors(HALF), inner_bias=None, bias=None)
        product, expected = NativeNeurons(context, tensors), in_float(tensors)
        chosen = case.subsets(3)
        unit = torch.randn(1, case.hidden)
        for scale in (0.0, 1e-37, 1e-15, 1e18):
            x = (unit * scale).repeat(3, 1).to(HALF)
            wanted = expected(x.float(), chosen)
            error = (product(x, chosen).float() - wanted).abs().max()
            assert error <= 2**-7 * wanted.abs().max() + 1e-37


def test_threads_agree() -> None:
    tensors = WIDE.tensors(HALF)
    x, chosen = torch.randn(5, WIDE.hidden).to(HALF), WIDE.subsets(5)
    one, many = (
        NativeNeurons(MODULE.Context(threads, "auto"), tensors)(x, chosen) for threads in (1, 3)
    )
    assert torch.equal(one, many)


def test_other_activations_are_torchs(context: extension._native.Context) -> None:
    case = NeuronCase(40, 24, gelu_tanh, False)
    assert isinstance(native_neurons(context, case.tensors(HALF)), GatheredNeurons)


class TestRefusals:
    """Memory is read by address, so nothing that does not fit gets there."""

    @pytest.fixture
    def product(self, context: extension._native.Context) -> NativeNeurons:
        return NativeNeurons(context, NeuronCase(40, 24, F.silu, False).tensors(HALF))

    def test_widths_that_sums_have_no_room_for(self, context: extension._native.Context) -> None:
        weight = torch.zeros(1, 3, 2**16 + 1, dtype=HALF)
        with pytest.raises(ValueError, match="hidden: must be at most 65536"):
            NativeNeurons(context, NeuronTensors(weight, F.silu))

    @pytest.mark.parametrize("neuron", [40, -2, 2**31 - 1])
    def test_neurons_that_there_are_not(self, product: NativeNeurons, neuron: int) -> None:
        chosen = torch.tensor([[0, 1], [5, neuron]], dtype=torch.int32)
        with pytest.raises(IndexError, match="every neuron must be one of the weight's"):
            product(torch.zeros(2, 24, dtype=HALF), chosen)

    @pytest.mark.parametrize(
        ("x", "chosen", "residual", "message"),
        [
            (torch.zeros(2, 23, dtype=HALF), None, None, "x is .* must be bfloat16"),
            (torch.zeros(2, 24), None, None, "x is .* must be bfloat16"),
            (None, torch.zeros(2, 3, dtype=torch.int64), None, "what is chosen is torch.int64"),
            (None, torch.zeros(3, 3, dtype=torch.int32), None, "what is chosen is"),
            (None, None, torch.zeros(2, 23, dtype=HALF), "the residual is"),
            (None, None, torch.zeros(2, 24), "the residual is"),
        ],
    )
    def test_shapes_and_types(
        self,
        product: NativeNeurons,
        x: Tensor | None,
        chosen: Tensor | None,
        residual: Tensor | None,
        message: str,
    ) -> None:
        x = torch.zeros(2, 24, dtype=HALF) if x is None else x
        chosen = torch.zeros(2, 3, dtype=torch.int32) if chosen is None else chosen
        with pytest.raises(ValueError, match=message):
            product(x, chosen, residual=residual)

    def test_norms(self, product: NativeNeurons) -> None:
        x, chosen = torch.zeros(2, 24, dtype=HALF), torch.zeros(2, 3, dtype=torch.int32)
        for weight in (torch.ones(24), torch.ones(23, dtype=HALF)):
            with pytest.raises(ValueError, match="the norm is"):
                product(x, chosen, norm=RMSNorm(weight, 1e-5))

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (NeuronTensors(torch.zeros(4, 3, 8), F.silu), "the weight is torch.float32"),
            (NeuronTensors(torch.zeros(4, 2, 8, dtype=HALF), F.silu), "the weight is"),
            (NeuronTensors(torch.zeros(4, 3, 8, dtype=torch.int8), F.silu), "the weight is"),
            (
                NeuronTensors(torch.zeros(4, 3, 8, dtype=HALF), F.silu, scales=torch.ones(4, 3)),
                "the weight is torch.bfloat16",
            ),
            (
                NeuronTensors(
                    torch.zeros(4, 3, 8, dtype=torch.int8), F.silu, scales=torch.ones(4, 2)
                ),
                "the tensor of scales is",
            ),
            (
                NeuronTensors(torch.zeros(4, 3, 16, dtype=HALF)[..., ::2], F.silu),
                "the weight is .* without gaps",
            ),
            (
                NeuronTensors(torch.zeros(4, 3, 8, dtype=HALF), F.silu, torch.zeros(2, 4)),
                "the bias of gate and up is",
            ),
            (
                NeuronTensors(torch.zeros(4, 3, 8, dtype=HALF), F.silu, None, torch.zeros(7)),
                "the bias is",
            ),
        ],
    )
    def test_weights(
        self, context: extension._native.Context, tensors: NeuronTensors, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            NativeNeurons(context, tensors)
