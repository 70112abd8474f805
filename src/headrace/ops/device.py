"""Devices: which one to use, what it likes, how much memory it has. Nothing else asks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.errors import ConfigurationError
from headrace.ops.extension import supported_isas
from headrace.ops.host import available_memory, isa_features

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Device:
    """A resolved device.

    Args:
        name: torch's name, "cpu" or "cuda:0".
        step_tokens: inputs per step by default: enough to fill the arithmetic units, few enough
            to keep decodes that share the step waiting briefly.
        fast_dtypes: element types with fast arithmetic, by name.
    """

    name: str
    step_tokens: int
    fast_dtypes: frozenset[str]

    def choose_dtype(self, wanted: str, stored: str) -> str:
        """The compute dtype for ``wanted`` ("auto" or a name) and the checkpoint's ``stored``.

        A stored half-precision type without fast arithmetic is computed in the other half type
        where that is fast, else in float32.
        """
        if wanted != "auto":
            return wanted
        if stored in self.fast_dtypes:
            return stored
        return "bfloat16" if "bfloat16" in self.fast_dtypes else "float32"

    def free_memory(self) -> int:
        """Bytes that can still be allocated."""
        if self.name == "cpu":
            return available_memory()
        return int(torch.cuda.mem_get_info(self.name)[0])

    def synchronize(self) -> None:
        """Wait until queued work is done, so that it can be timed."""
        if self.name != "cpu":
            torch.cuda.synchronize(self.name)


def empty_bytes(count: int, device: str) -> Tensor:
    """Memory that is not touched yet, uint8 ``[count]``, aligned to 64 bytes.

    On the CPU it comes from numpy, which asks Linux for huge pages where torch does not: memory
    that is read in pieces far apart then costs fewer page walks.
    """
    if device != "cpu":
        return torch.empty(count, dtype=torch.uint8, device=device)
    memory = np.empty(count + 63, dtype=np.uint8)
    skip = -memory.ctypes.data % 64
    return torch.from_numpy(memory[skip : skip + count])


def resolve_device(name: str) -> Device:
    """The device for ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        ConfigurationError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        native = set(supported_isas()) - {"portable"}
        fast = native or isa_features() & {"avx512_bf16", "amx_bf16"}
        halves = {"bfloat16"} if fast else set()
        return Device("cpu", 512, frozenset({"float32", *halves}))
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index == "" or index.isdigit()):
        raise ConfigurationError(f"device: {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device: {name!r} is not there; torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return Device(f"cuda:{number}", 4096, frozenset(DTYPES))
