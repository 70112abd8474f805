"""Weights and KV pages on disk: what comes out is what an engine in memory computes."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import LLM
from headrace.config import EngineConfig
from headrace.contracts.outputs import RequestOutput
from headrace.disk import DiskFile
from headrace.errors import ConfigurationError
from headrace.kv.tiered_arena import TieredArena
from headrace.loading import quantize_model
from headrace.weights.streaming import WeightTier
from tests.models.expected import TOLERANCE, Expected, difference, greedy, load, prompt_of
from tests.support.checkpoints import ALL_CONFIGS, make_model, save_checkpoint
from tests.support.logits import LogitsRecorder

LAYERS = 5
PROMPTS = [prompt_of(length, 1) for length in (23, 1, 9, 31, 14)]
SMALL: dict[str, Any] = {
    "block_size": 4,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 4,
    "max_model_len": 48,
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """A model of an odd number of layers."""
    config = ALL_CONFIGS["llama-biases"]()
    config.num_hidden_layers = LAYERS
    model = make_model(config)
    return Expected(model, save_checkpoint(model, tmp_path_factory.mktemp("deep")))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory, which is left as it was found, as are threads and open files."""
    before = set(os.listdir("/proc/self/fd"))
    directory = tmp_path / "disk"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []
    assert not [t.name for t in threading.enumerate() if t.name.startswith("headrace-")]
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before
              if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")]
    assert not [path for path in opened if path.startswith(str(directory))]


def method(disk: Path, memory: int | str, **options: Any) -> tuple[str]:
    listed = "".join(f",{key}={str(value).lower()}" for key, value in options.items())
    return (f"flexgen:memory={memory},directory={disk}{listed}",)


def least_memory(directory: Path, disk: Path, options: dict[str, Any], **chosen: Any) -> int:
    """The smallest cap, as the message says it that refuses a smaller one."""
    with pytest.raises(ConfigurationError, match="flexgen: memory: at least") as raised:
        load(directory, methods=method(disk, 1, **chosen), **options)
    found = re.search(r"at least (\d+) bytes", str(raised.value))
    assert found is not None
    return int(found[1])


def tiers(llm: LLM) -> tuple[WeightTier, TieredArena]:
    """What is on disk of an engine that has both there."""
    weights, arena = llm.engine.runner._tiers  # type: ignore[attr-defined]
    assert isinstance(weights, WeightTier) and isinstance(arena, TieredArena)
    return weights, arena


def load_least(directory: Path, disk: Path, options: dict[str, Any], **chosen: Any) -> LLM:
    """An engine that has everything on disk that can be."""
    cap = least_memory(directory, disk, options, **chosen)
    llm = load(directory, methods=method(disk, cap, **chosen), **options)
    weights, arena = tiers(llm)
    assert weights.layers == arena.spilled == frozenset(range(LAYERS))
    return llm


def run(llm: LLM, prompts: list[list[int]] = PROMPTS, **params: Any) -> list[Tensor]:
    """Logits of each request."""
    recorder = LogitsRecorder(llm)
    outputs = llm.generate(prompts, greedy(8, **params))
    assert [output.error for output in outputs] == [None] * len(prompts)
    llm.engine.check_integrity()
    return [
        recorder.logits(output, index)
        for output in outputs
        for index in range(len(output.outputs))
    ]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        pytest.param({}, {"micro_batch": 1}, id="one row at a time"),
        pytest.param({}, {"micro_batch": 3, "overlap": False}, id="no overlap"),
        pytest.param({"max_num_batched_tokens": 5}, {"micro_batch": 2}, id="chunks"),
        pytest.param({"kv_cache_memory_bytes": 40 * 10240}, {"micro_batch": 2}, id="preemption"),
        pytest.param({"enable_prefix_caching": False}, {"direct": False}, id="page cache"),
    ],
)
def test_bit_for_bit_in_reference_mode(
    deep: Expected, disk: Path, options: dict[str, Any], chosen: dict[str, Any]
) -> None:
    options = {**SMALL, "reference": True, **options}
    with load(deep.directory, **options) as llm:
        plain = run(llm)
    with load_least(deep.directory, disk, options, **chosen) as llm:
        placed = run(llm)
        preempted = llm.stats().preemptions
    assert (preempted > 0) == ("kv_cache_memory_bytes" in options)
    assert all(torch.equal(one, other) for one, other in zip(plain, placed, strict=True))
