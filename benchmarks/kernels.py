"""The native products by themselves, as shares of what memory and arithmetic allow.

For one row of activations the limit is the bandwidth of memory, for many it is the speed of the
inner product on operands in the nearest cache, which every instruction set measures for itself.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from harness import Result, in_fresh_process, progress

from headrace.ops.block_weight import BlockWeight, pack_blocks
from headrace.ops.extension import EMULATED, open_context, supported_isas
from headrace.ops.host import usable_cores
from headrace.ops.linear import Linear, LinearOps
from headrace.ops.packed_weight import FORMATS, PackedWeight, WeightFormat, part_shapes
from headrace.ops.table import native_ops
from headrace.weights.gguf.block_types import BLOCK_TYPES, BlockType

ROWS, COLUMNS = 8192, 2048
TOKENS = (1, 16, 512)
BUFFER = 4 << 30
STREAM = 512 << 20
"""Bytes of different weights that a measurement goes through, so that no cache holds them."""


TYPES = {type.name: type for type in BLOCK_TYPES if type.layout is not None}
"""GGUF's quantized types by name."""


def random_weight(format: WeightFormat) -> PackedWeight:
    """A weight of the benchmark's shape with any values: speed does not see them."""
    parts = {}
    for name, (dtype, shape) in part_shapes(format, ROWS, COLUMNS, False).items():
        whole = dtype == torch.uint8
        values = torch.randint(1, 255, shape) if whole else torch.rand(shape)
        parts[name] = values.to(dtype)
    return PackedWeight(format, ROWS, COLUMNS, False, **parts)


def measure_isa(isa: str, formats: list[str], buffer: int, stream: int, repeats: int) -> Any:
    """Limits, and (seconds per product, bytes of a weight) by format and number of tokens."""
    torch.manual_seed(0)
    context = open_context(isa, usable_cores())
    assert context is not None
    data = torch.ones(buffer // 8, dtype=torch.int64)
    bandwidth = max(_read(context, data) for _ in range(3))
    del data
    limits = {"bandwidth": bandwidth}
    for kind in ("int8", "bf16"):
        context.peak(kind, 10)
        steps = 100 if isa == "portable" else 10_000
        start = time.perf_counter()
        operations = context.peak(kind, steps)
        limits[kind] = operations / (time.perf_counter() - start)
    ops = native_ops(context).linears
    copies = {format: make_copies(format, ops, stream) for format in formats}
    times: dict[str, list[float]] = {}
    # In turn, so that a slow minute of the machine is every format's.
    for _ in range(repeats):
        for format, linears in copies.items():
            for tokens in TOKENS:
                used = linears if tokens < 100 else linears[:2]
                times.setdefault(f"{format} {tokens}", []).append(_multiply(used, tokens))
    sizes = {format: linears[0].num_bytes for format, linears in copies.items()}
    return limits, {key: (median(found), sizes[key.split()[0]]) for key, found in times.items()}


def make_copies(name: str, ops: LinearOps, stream: int) -> list[Linear]:
    """As many equal weights as take ``stream`` bytes, of a format of ours or a type of GGUF."""
    type = TYPES.get(name)
    if type is not None:
        blocks = random_blocks(type)
        count = max(1, stream // blocks.num_bytes)
        return [ops.blocks(blocks.map(torch.clone)) for _ in range(count)]
    format = WeightFormat.parse(name)
    one = random_weight(format)
    count = max(1, stream // one.num_bytes)
    return [
        ops.packed(PackedWeight(format, ROWS, COLUMNS, False, **_copy(one))) for _ in range(count)
    ]


def random_blocks(type: BlockType) -> BlockWeight:
    """A weight of the benchmark's shape out of random blocks."""
    assert type.layout is not None
    rows = torch.randint(0, 256, (ROWS, type.row_bytes(COLUMNS)), dtype=torch.uint8)
    return pack_blocks(type.parts(rows.numpy()), type.layout)


def _copy(weight: PackedWeight) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in weight.parts().items()}


def _read(context: Any, data: torch.Tensor) -> float:
    start = time.perf_counter()
    context.read(data.data_ptr(), data.nbytes)
    return data.nbytes / (time.perf_counter() - start)


def _multiply(linears: list[Linear], tokens: int) -> float:
    """Seconds per product."""
    x = torch.randn(tokens, COLUMNS).bfloat16()
    start = time.perf_counter()
    for linear in linears:
        linear(x)
    return (time.perf_counter() - start) / len(linears)


def measure(rounds: int, quick: bool) -> Result:
    """Every instruction set of this processor, every format."""
    return measure_formats([f.name for f in FORMATS if not f.zero_points], rounds, quick)


def measure_formats(formats: list[str], rounds: int, quick: bool) -> Result:
    """Every instruction set of this processor, some formats and types."""
    if quick:
        formats = formats[:3]
    sizes = (64 << 20, 16 << 20, 1) if quick else (BUFFER, STREAM, rounds)
    rows: list[list[Any]] = []
    details = {}
    for isa in supported_isas():
        if isa == EMULATED:
            continue
        progress(f"kernels of {isa}")
        limits, found = in_fresh_process(measure_isa, isa, formats, *sizes)
        details[isa] = {"limits": limits, "found": found}
        for format in formats:
            peak = limits["bf16" if format == "bf16" else "int8"]
            row: list[Any] = [f"{isa}, {format}"]
            for tokens in TOKENS:
                seconds, size = found[f"{format} {tokens}"]
                done, limit = size / seconds, limits["bandwidth"]
                if tokens > 1:
                    done, limit = 2 * tokens * ROWS * COLUMNS / seconds, peak
                row += [done / 1e9, 100 * done / limit]
            rows.append(row)
    columns = [
        name
        for n in TOKENS
        for name in (f"{n} rows, {'GB/s' if n == 1 else 'GOP/s'}", "% of limit")
    ]
    return Result(
        f"products with a weight of {ROWS} x {COLUMNS} on {usable_cores()} threads: for one row "
        "bytes of weights per second as a share of the bandwidth, for more operations per second "
        "as a share of the instruction set's own peak",
        ["", *columns],
        rows,
        details,
    )
