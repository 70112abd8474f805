"""The engine on a device that is not the CPU: nothing is left behind, nothing comes out else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import LLM
from headrace.ops import attention
from headrace.ops.device import DTYPES, Device
from tests.exec.foreign_device import NAME, ForeignTensor, foreign_device
from tests.gpu import workload
from tests.gpu.checkpoint import write_checkpoint


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Engines set the number of threads for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that are made now find the device, whatever they ask for."""
    device = Device(NAME, 64, frozenset(DTYPES))
    with foreign_device():
        monkeypatch.setattr("headrace.loading.resolve_device", lambda name: device)
        yield


class TestTheDevice:
    """It does catch what would fail elsewhere."""

    @pytest.mark.parametrize(
        "mistake",
        [
            lambda x: x + torch.ones(4),
            lambda x: x[torch.tensor([0, 1])],
            lambda x: x.index_copy_(0, torch.tensor([0]), x[1:2] + 1),
            lambda x: torch.cat([x, torch.zeros(1, 4)]),
            lambda x: torch.where(torch.ones(3, 4, dtype=torch.bool), x, 0),
            lambda x: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0),
            lambda x: torch.nn.functional.linear(x, torch.ones(2, 4)),
            lambda x: x.__setitem__(slice(1), torch.from_numpy(np.zeros((1, 4))) * x[:1]),
        ],
    )
    def test_mixed_devices(self, mistake: Callable[[torch.Tensor], object]) -> None:
        mistake(torch.zeros(3, 4))
        with foreign_device() as name, pytest.raises(RuntimeError, match="on the CPU"):
            mistake(torch.zeros(3, 4, device=name))

    def test_what_is_allowed(self) -> None:
        with foreign_device() as name:
            x = torch.arange(6.0, device=name).view(2, 3)
            assert isinstance(x, ForeignTensor) and x.device.type == name
            x[:, 1] = 7
            x += torch.tensor(1.0)
            x[1:].copy_(torch.full((1, 3), 5.0))
            assert x.tolist() == [[1.0, 8.0, 3.0], [5.0, 5.0, 5.0]]
            assert x.to("cpu").sum().item() == 27
            assert not isinstance(x.cpu(), ForeignTensor)
            assert torch.tensor([1, 2], device=name).device.type == name


@pytest.mark.parametrize(
    ("name", "reference"), [*((name, False) for name in workload.NAMES), ("sampled", True)]
)
def test_results_are_the_cpus(
    checkpoint: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    reference: bool,
) -> None:
    options: dict[str, Any] = {"dtype": "float32", "reference": reference, "device": "cpu"}
    # The kernel that other devices use, so that not a bit may differ.
    monkeypatch.setattr("headrace.ops.table.flash_kernel", attention.matmul_kernel)
    expected = workload.run(name, LLM(str(checkpoint), **options, **workload.OPTIONS[name]))
    request.getfixturevalue("foreign")
    llm = LLM(str(checkpoint), **options, **workload.OPTIONS[name])
    assert llm.model_info.device == NAME
    assert workload.run(name, llm) == expected
