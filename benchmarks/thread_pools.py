"""One thread pool or two: what torch's spinning threads cost the native kernels beside them.

A step of inference alternates between native products and small operations of torch. With threads
in both pools, the threads of one still spin, waiting for more work, when the other's begin.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from harness import Result, in_fresh_process

from headrace.ops.device import Device
from headrace.ops.host import usable_cores
from headrace.ops.table import make_ops

WIDTH, LAYERS = 1024, 40


def measure_pools(rows: int, torch_threads: int, steps: int) -> float:
    """Median milliseconds of a step of products and activations, after a warm-up."""
    threads = usable_cores()
    ops = make_ops(Device("cpu", 512, frozenset({"bfloat16"})), "bfloat16", threads=threads)
    if ops.isa == "torch":
        raise RuntimeError("the native kernels were not built")
    torch.set_num_threads(torch_threads)
    linear = ops.linears.dense(torch.randn(WIDTH, WIDTH).bfloat16() / WIDTH**0.5)
    x = torch.randn(rows, WIDTH).bfloat16()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(LAYERS):
            x = torch.tanh(linear(x))
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds[steps // 4 :])


def measure(rounds: int, quick: bool) -> Result:
    """Both arrangements in turn, for few and for many rows."""
    threads, steps = usable_cores(), 8 if quick else 60
    rows_of_table = []
    samples: dict[str, list[list[float]]] = {}
    for rows in (1, 16, 128):
        pairs = [
            [in_fresh_process(measure_pools, rows, count, steps) for count in (1, threads)]
            for _ in range(rounds)
        ]
        alone, both = (median(column) for column in zip(*pairs, strict=True))
        samples[str(rows)] = pairs
        rows_of_table.append([f"{rows} rows", alone, both, round(both / alone, 2)])
    return Result(
        f"{LAYERS} native products of width {WIDTH} with an operation of torch after each, "
        f"{threads} threads, ms: medians of {rounds} rounds",
        ["", "threads in the native pool only", "threads in both pools", "ratio"],
        rows_of_table,
        {"samples": samples},
    )
