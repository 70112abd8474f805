"""Which device is used, what it computes fast, what is refused."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConfigurationError
from headrace.ops import device
from headrace.ops.device import Device, resolve_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "found"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_with_gpus(asked: str, found: str) -> None:
    assert resolve_device(asked).name == found


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("asked", ["cuda:2", "gpu", "cuda:x", "cuda:-1", "", "CPU", "cpu:0"])
def test_unknown_ones_are_refused(asked: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^device: ") as caught:
        resolve_device(asked)
    assert repr(asked) in str(caught.value)


@pytest.mark.usefixtures("no_gpu")
def test_without_gpus() -> None:
    assert resolve_device("auto").name == "cpu"
    with pytest.raises(ConfigurationError, match=r"^device: 'cuda' is not there.*sees 0 CUDA"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("features", "kernels", "fast"),
    [
        (set(), (), {"float32"}),
        ({"avx2", "avx512f"}, (), {"float32"}),
        ({"avx2"}, ("portable",), {"float32"}),
        ({"avx2"}, ("portable", "avx2"), {"float32", "bfloat16"}),
        ({"avx512_bf16"}, (), {"float32", "bfloat16"}),
        ({"amx_bf16", "amx_tile"}, (), {"float32", "bfloat16"}),
    ],
)
def test_what_a_cpu_computes_fast(
    monkeypatch: pytest.MonkeyPatch, features: set[str], kernels: tuple[str, ...], fast: set[str]
) -> None:
    monkeypatch.setattr(device, "isa_features", lambda: frozenset(features))
    monkeypatch.setattr(device, "supported_isas", lambda: kernels)
    assert resolve_device("cpu").fast_dtypes == fast


@pytest.mark.parametrize(
    ("fast", "wanted", "stored", "chosen"),
    [
        ({"float32"}, "auto", "float32", "float32"),
        ({"float32"}, "auto", "bfloat16", "float32"),
        ({"float32"}, "auto", "float16", "float32"),
        ({"float32", "bfloat16"}, "auto", "bfloat16", "bfloat16"),
        ({"float32", "bfloat16"}, "auto", "float16", "bfloat16"),
        ({"float32", "bfloat16"}, "auto", "float32", "float32"),
        ({"float32", "bfloat16", "float16"}, "auto", "float16", "float16"),
        ({"float32"}, "bfloat16", "float32", "bfloat16"),
        ({"float32"}, "float32", "bfloat16", "float32"),
    ],
)
def test_the_compute_dtype(fast: set[str], wanted: str, stored: str, chosen: str) -> None:
    assert Device("cpu", 512, frozenset(fast)).choose_dtype(wanted, stored) == chosen


def test_the_cpu_has_memory_and_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 12_345)
    cpu = resolve_device("cpu")
    assert cpu.free_memory() == 12_345
    cpu.synchronize()
