"""What the hardware offers: cores, memory, instruction sets, and its measured bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from headrace.ops import host
from headrace.ops.extension import open_context

X86_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM_FEATURES = ("asimd", "sve", "bf16", "i8mm")
"""Feature flags that decide how fast a processor multiplies matrices, as the kernel names them."""

_LEAST_BUFFER = 256 << 20


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """The machine as this process may use it.

    Args:
        isa: the features above that it has.
        available_memory: bytes that may still be taken.
        last_level_cache: bytes; 0 if unknown.
        memory_bandwidth: bytes per second that all cores together read.
    """

    processor: str
    cores: int
    isa: tuple[str, ...]
    available_memory: int
    last_level_cache: int
    memory_bandwidth: float


def probe() -> HardwareProfile:
    """Look at the machine and measure its bandwidth (about a second)."""
    cores, memory, cache = host.usable_cores(), host.available_memory(), host.last_level_cache()
    features = host.isa_features()
    isa = tuple(name for name in (*X86_FEATURES, *ARM_FEATURES) if name in features)
    bandwidth = read_bandwidth(cores, min(max(_LEAST_BUFFER, 4 * cache), memory // 4))
    return HardwareProfile(host.cpu_name(), cores, isa, memory, cache, bandwidth)


def read_bandwidth(cores: int, size: int, seconds: float = 0.5) -> float:
    """Bytes per second at which ``cores`` threads read ``size`` bytes, at best in ``seconds``.

    The buffer must be well larger than the caches for this to be the memory's speed. Read by the
    native kernels, or by numpy where these were not built.
    """
    buffer = np.ones(max(size // 8, cores), dtype=np.int64)
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        read = _reader(buffer, cores, pool)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            read()
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def _reader(
    buffer: npt.NDArray[np.int64], cores: int, pool: ThreadPoolExecutor
) -> Callable[[], object]:
    """What reads the buffer once with all threads."""
    context = open_context("auto", cores)
    if context is not None:
        return partial(context.read, buffer.ctypes.data, buffer.nbytes)
    parts = np.array_split(buffer, cores)
    # A reduction releases the interpreter lock and does nothing but read.
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))
