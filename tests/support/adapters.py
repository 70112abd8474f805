"""Adapters as PEFT writes them, with random factors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    base: Path, directory: Path, seed: int, targets: tuple[str, ...] = TARGETS, **changed: Any
) -> Path:
    """A PEFT directory for the linear weights of a checkpoint that end in ``targets``."""
    tensors = load_file(base / "model.safetensors")
    shapes = {name.removesuffix(".weight"): tuple(each.shape) for name, each in tensors.items()}
    chosen = {module: shape for module, shape in shapes.items() if module.endswith(targets)}
    return write_factors(chosen, directory, seed, **changed)


def write_factors(
    shapes: Mapping[str, tuple[int, ...]], directory: Path, seed: int, **changed: Any
) -> Path:
    """A PEFT directory.

    Args:
        shapes: module -> rows and columns of its weight.
        changed: entries of the configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = 2 + seed % 3
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        **changed,
    }
    tensors = {}
    for module, (rows, columns) in shapes.items():
        stem = f"base_model.model.{module}"
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        up = torch.randn(rows, rank, generator=generator) * 0.3
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
