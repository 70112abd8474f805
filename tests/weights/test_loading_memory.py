"""What loading takes at its peak: the weights, and one tensor at a time beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.weights.gguf.block_types import BLOCK_TYPES
from tests.support.gguf_files import RawTensor, write_gguf

HIDDEN, WIDE, VOCAB, LAYERS = 2048, 8192, 64000, 2
ROOM = 300 << 20
"""Bytes that loading may take beside the weights and the largest tensor."""

LOAD = """
import json, re, sys
from pathlib import Path
import torch
from headrace.models.base import find_architecture
from headrace.ops.device import resolve_device
from headrace.ops.table import make_ops
from headrace.weights.formats import WeightPlan
from headrace.weights.gguf.checkpoint import GGUFCheckpoint
from headrace.weights.loader import make_loader

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\\s*(\\d+) kB", text, re.MULTILINE)[1]) << 10

torch.set_num_threads(1)
ops = make_ops(resolve_device("cpu"), "bfloat16", threads=1)
before = status("VmRSS")
checkpoint = GGUFCheckpoint(Path(sys.argv[1]))
model = find_architecture(checkpoint.config)
loader = make_loader(checkpoint, model.load_map, ops, WeightPlan())
kept = model(checkpoint.config, loader, ops)
print(json.dumps({
    "peak": status("VmHWM") - before,
    "resident": status("VmRSS") - before,
    "weights": loader.num_bytes,
}))
"""


def write_model(path: Path, type_name: str) -> Path:
    """A Llama whose matrices are random blocks."""
    type = next(type for type in BLOCK_TYPES if type.name == type_name)
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> RawTensor:
        data = generator.bytes(rows * type.row_bytes(columns))
        return RawTensor(f"{name}.weight", (rows, columns), type.number, data)

    def vector(name: str) -> RawTensor:
        return RawTensor(f"{name}.weight", (HIDDEN,), 0, np.ones(HIDDEN, np.float32).tobytes())

    tensors = [matrix("token_embd", VOCAB, HIDDEN), matrix("output", VOCAB, HIDDEN)]
    tensors.append(vector("output_norm"))
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        tensors += [matrix(f"{prefix}attn_{kind}", HIDDEN, HIDDEN) for kind in ("q", "output")]
        tensors += [matrix(f"{prefix}attn_{kind}", HIDDEN // 4, HIDDEN) for kind in ("k", "v")]
        tensors += [matrix(f"{prefix}ffn_{kind}", WIDE, HIDDEN) for kind in ("gate", "up")]
        tensors.append(matrix(f"{prefix}ffn_down", HIDDEN, WIDE))
        tensors += [vector(f"{prefix}{kind}_norm") for kind in ("attn", "ffn")]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 4096,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HIDDEN // 64,
        "llama.attention.head_count_kv": HIDDEN // 256,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": VOCAB,
    }
    return write_gguf(path, metadata, tensors)


@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0"])
def test_loading_streams(type_name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", type_name)
    size = path.stat().st_size
    command = [sys.executable, "-c", LOAD, str(path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    parameters = 2 * VOCAB * HIDDEN + LAYERS * (5 * HIDDEN**2 // 2 + 3 * WIDE * HIDDEN)
    largest = size * VOCAB * HIDDEN // parameters
    assert found["weights"] <= 1.1 * size
    assert found["resident"] <= 1.1 * size + (16 << 20)
    assert found["peak"] <= found["weights"] + largest + ROOM
