"""Products with some neurons: every version against the reference, and that against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headrace.ops import reference
from headrace.ops.linear import RMSNorm
from headrace.ops.neurons import NeuronTensors, ReferenceNeurons
from headrace.ops.selection import partitioned_strongest, strongest
from headrace.ops.table import VERSIONS
from tests.ops.function_cases import TOLERANCES
from tests.ops.neuron_cases import CASES, NeuronCase


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("version", VERSIONS["neurons"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_versions_agree(case: NeuronCase, version: str, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    tested, expected = (VERSIONS["neurons"][name](tensors) for name in (version, "reference"))
    allowed = TOLERANCES[dtype]
    if dtype == torch.bfloat16:
        allowed = {"rtol": 2**-6, "atol": 2**-5}  # rounded after gate, inner, sum and residual
    for x, chosen, options in case.calls(dtype):
        before = x.clone(), chosen.clone()
        found = tested(x, chosen, **options)  # type: ignore[operator]
        assert found.dtype == dtype
        wanted = expected(x, chosen, **options)  # type: ignore[operator]
        torch.testing.assert_close(found, wanted, **allowed)
        assert torch.equal(x, before[0]) and torch.equal(chosen, before[1])


def by_definition(x: Tensor, chosen: Tensor, tensors: NeuronTensors) -> Tensor:
    """Neuron by neuron in fp64; SiLU."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    weight = tensors.weight.double()
    if tensors.scales is not None:
        weight = weight * tensors.scales.double()[..., None]
    for row, vector in enumerate(x.double()):
        for neuron in chosen[row].tolist():
            if neuron >= 0:
                gate_row, up_row, column = weight[neuron]
                gate, up = float(gate_row @ vector), float(up_row @ vector)
                if tensors.inner_bias is not None:
                    gate += float(tensors.inner_bias[neuron, 0])
                    up += float(tensors.inner_bias[neuron, 1])
                out[row] += gate / (1 + math.exp(-gate)) * up * column
        if tensors.bias is not None:
            out[row] += tensors.bias.double()
    return out


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_the_definition(bias: bool, quantized: bool) -> None:
    case = NeuronCase(40, 24, torch.nn.functional.silu, bias, quantized)
    tensors = case.tensors(torch.float32)
    product = ReferenceNeurons(tensors, reference.rms_norm)
    x, chosen, residual = torch.randn(9, 24), case.subsets(9), torch.randn(9, 24)
    norm = RMSNorm(torch.rand(24), 1e-5)
    plain = by_definition(x, chosen, tensors)
    torch.testing.assert_close(product(x, chosen).double(), plain, rtol=1e-5, atol=1e-5)
    normed = reference.rms_norm(x, norm.weight, norm.eps)
    wanted = by_definition(normed, chosen, tensors) + residual
    found = product(x, chosen, norm=norm, residual=residual)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_integers_are_the_nearest() -> None:
    """A row's largest magnitude is 127 steps, and nothing is further off than half a step."""
    plain = NeuronCase(40, 24, torch.nn.functional.silu, True).tensors(torch.float32)
    quantized = plain.quantized()
    assert quantized.scales is not None and quantized.inner_bias is plain.inner_bias
    steps = quantized.weight.float()
    assert (steps.abs().amax(2) == 127).all()
    error = (steps * quantized.scales[..., None] - plain.weight).abs()
    assert (error <= 0.5001 * quantized.scales[..., None]).all()
    assert quantized.num_bytes < plain.num_bytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [1e-9, 0.4, 1.0])
def test_the_strongest_are_found(share: float, dtype: torch.dtype) -> None:
    """Among equals, all or none positive, infinite, and where the product is hardly whole."""
    torch.manual_seed(1)
    values = torch.randn(9, 200).to(dtype)
    values[1], values[2], values[3] = -values[1].abs(), 0, values[3].abs()
    values[4] = values[4].sign()
    values[5, 7] = torch.inf
    values[6, 10:] = -1
    values[7, :5], values[7, 5:] = 0.5, -1
    found = strongest(values, share)
    assert torch.equal(partitioned_strongest(values, share), found)
    for row, lowest in zip(values.tolist(), found.flatten().tolist(), strict=True):
        positive = sorted((value for value in row if value > 0), reverse=True)
        size = math.ceil(share * len(positive))
        assert lowest == (positive[size - 1] if size else math.inf)
