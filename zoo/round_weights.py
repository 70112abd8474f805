"""Round a model's linear weights to few bits, to see that an evaluation notices.

    python -m zoo.round_weights zoo/models/base --bits 2 -o broken

The checkpoint stays in bfloat16 and takes as much memory as before: it is there to be caught.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo.export import write_weights

GROUP = 32
"""Columns that share a scale."""


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Round ``(rows, columns)`` to the nearest of ``2 ** bits`` levels, evenly spaced about 0.

    The outermost levels lie where the largest magnitude of a group is.
    """
    if weight.shape[1] % GROUP:
        raise ValueError(f"{weight.shape[1]} columns are not a multiple of {GROUP}")
    groups = weight.float().unflatten(1, (-1, GROUP))
    outermost = 2 ** (bits - 1) - 0.5
    step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / outermost
    levels = ((groups / step).floor() + 0.5).clamp(-outermost, outermost)
    rounded: Tensor = (levels * step).flatten(1).to(weight.dtype)
    return rounded


def round_checkpoint(source: Path, target: Path, bits: int) -> None:
    """Write ``source`` with the weights of all projections rounded; the embedding stays."""
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("model*.safetensors")):
        weights |= load_file(file)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    projections = {name for name in weights if name.endswith("_proj.weight")}
    with torch.inference_mode():
        write_weights(
            {
                name: round_weight(value, bits) if name in projections else value
                for name, value in weights.items()
            },
            target,
        )


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m zoo.round_weights", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    round_checkpoint(options.model, options.output, options.bits)


if __name__ == "__main__":
    main()
