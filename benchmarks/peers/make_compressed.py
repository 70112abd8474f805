"""Write a checkpoint in the "compressed-tensors" layout that vLLM reads.

int8: one scale per output channel, activations quantized per token as they come. int4: one scale
per 128 weights of a row. Rounding to nearest, without a search: this is for speed only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP = 128
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
}
LAYOUTS = {"int8": "int-quantized", "int4": "pack-quantized"}


def quantization_config(form: str) -> dict[str, Any]:
    """What ``config.json`` says of the weights."""
    plain = {"type": "int", "symmetric": True}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {**plain, "dynamic": False, **WEIGHTS[form]},
        "input_activations": None,
    }
    if form == "int8":
        group["input_activations"] = {
            **plain,
            "num_bits": 8,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": LAYOUTS[form],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def quantize(name: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for a linear layer's weight."""
    rows, columns = weight.shape
    groups = 1 if form == "int8" else columns // GROUP
    largest = 127 if form == "int8" else 7
    parts = weight.float().view(rows, groups, -1)
    scales = (parts.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-8)
    codes = (parts / scales).round().clamp(-largest - 1, largest).view(rows, columns)
    scales = scales.squeeze(-1).to(torch.bfloat16)
    if form == "int8":
        return {name: codes.to(torch.int8), f"{name}_scale": scales}
    # Eight codes to a word, the first in its lowest bits, kept above zero by an offset.
    nibbles = (codes + 8).to(torch.int64).view(rows, -1, 8)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return {
        f"{name}_packed": words,
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def convert(checkpoint: Path, target: Path, form: str) -> None:
    """Write the directory ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = quantization_config(form)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, target)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            tensor = file.get_tensor(name)
            if name.endswith("_proj.weight"):
                tensors |= quantize(name, tensor, form)
            else:
                tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
