"""What the machine allows: measured speeds, and what a workload could reach with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.plan.hardware import read_bandwidth
from peers.workloads import Workload

READ_BYTES = 4 << 30
"""Well more than any cache holds."""
SIDE = 2048
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Bytes per second read from memory, and operations per second (an addition counts)."""

    bandwidth: float
    bf16_operations: float
    int8_operations: float

    @classmethod
    def median(cls, measured: Sequence[Limits]) -> Limits:
        """The median of each."""
        fields = [asdict(limits) for limits in measured]
        return cls(**{name: statistics.median(f[name] for f in fields) for name in fields[0]})


def measure_limits(threads: int) -> Limits:
    """Measure them with so many threads. Takes 4 GiB while it runs."""
    import torch

    torch.set_num_threads(threads)
    wide = torch.randn(SIDE, SIDE).to(torch.bfloat16)
    narrow = torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8)
    operations = 2 * SIDE**3
    return Limits(
        _bandwidth(threads),
        operations / _best(lambda: wide @ wide),
        operations / _best(lambda: torch._int_mm(narrow, narrow)),
    )


def _bandwidth(threads: int) -> float:
    """The better of torch and a load loop over the same number of bytes."""
    import torch

    words = torch.ones(READ_BYTES // 4, dtype=torch.int32).view(torch.float32)
    summed = READ_BYTES / _best(words.sum)
    del words
    return max(summed, read_bandwidth(threads, READ_BYTES))


def _best(function: Callable[[], Any]) -> float:
    """Seconds of the fastest call after one that warms up."""
    function()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def attainable(
    workload: Workload,
    config: dict[str, Any],
    limits: Limits,
    bits: int,
    weights: float,
    kv_token: float,
) -> float | None:
    """The figure of a workload that only the hardware would limit; ``None`` where none is known.

    Prompts are bound by arithmetic, decoding by the bytes of the weights and of the KV cache.

    Args:
        bits: of a weight, which say which multiplications could be used.
        weights: bytes that a step reads.
        kv_token: bytes of KV cache of a token.
    """
    if workload.figure == "start":
        return None
    peak = limits.bf16_operations if bits == 16 else limits.int8_operations
    prompt = workload.rows * workload.prompt * _operations(config, workload.prompt) / peak
    context = workload.prompt + workload.output / 2
    step = (weights + workload.rows * context * kv_token) / limits.bandwidth
    if workload.figure == "prefill":
        return workload.prompt / prompt
    if workload.figure == "decode":
        return 1 / step
    return workload.rows * workload.output / (prompt + (workload.output - 1) * step)


def _operations(config: dict[str, Any], length: int) -> float:
    """Operations per token of a prompt, on average; the output head runs for the last only."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linear = hidden * (2 * queries + 2 * keys + 3 * inner)
    # Each query meets half of the prompt, once for the scores and once for the values.
    attention = 2 * queries * length / 2
    operations: float = 2 * config["num_hidden_layers"] * (linear + attention)
    return operations
