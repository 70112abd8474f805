"""Make a checkpoint with random weights in the shape of a real model: speed does not see values.

    python benchmarks/make_checkpoint.py --shape llama-3.2-1b

Nothing is downloaded; the tokenizer is the embedded model's, so prompts are best token ids.
Weights are written one tensor at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from harness import CACHE, progress

import headrace

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
    },
}


def tensors(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> size of every weight of a Llama model with tied embeddings."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(shape["num_hidden_layers"]):
        sizes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    return found


def write_safetensors(path: Path, sizes: dict[str, tuple[int, ...]]) -> None:
    """Write bf16 tensors: matrices of N(0, 0.02), vectors of ones."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in sizes.items():
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            tensor = torch.ones(size, dtype=torch.bfloat16)
            if len(size) > 1:
                tensor.normal_(0.0, 0.02, generator=generator)
            file.write(tensor.view(torch.int16).numpy().tobytes())


def ensure_checkpoint(shape: str, root: Path = CACHE) -> Path:
    """The directory of a checkpoint of that shape, made if it is not there."""
    directory = root / shape
    if directory.exists():
        return directory
    partial = root / f"{shape}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    progress(f"making {directory}")
    (partial / "config.json").write_text(json.dumps({**COMMON, **SHAPES[shape]}, indent=2))
    embedded = Path(headrace.__file__).parent / "assets" / "embedded"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, partial)
    write_safetensors(partial / "model.safetensors", tensors(SHAPES[shape]))
    return partial.rename(directory)


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    made.add_argument("--root", type=Path, default=CACHE, help=f"default: {CACHE}")
    arguments = made.parse_args()
    print(ensure_checkpoint(arguments.shape, arguments.root))
