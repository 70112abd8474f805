"""Write a checkpoint as a bfloat16 GGUF file: ``make_gguf.py CHECKPOINT FILE``.

It runs in the environment of llama.cpp, which has no torch: tensors are copied as bytes.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

gguf: Any = importlib.import_module("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MOSTLY_BF16 = 32
"""The file type of llama.cpp for bfloat16 weights."""


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of a bfloat16 safetensors file as 16-bit integers, mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']}, not BF16")
            start, end = entry["data_offsets"]
            tensors[name] = data[start:end].view(np.uint16).reshape(entry["shape"])
    return tensors


def interleave(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a projection in the order of llama.cpp's rotation, which turns neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def rotation_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What the "llama3" scaling divides each frequency by."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    lengths = 2 * math.pi * rope["rope_theta"] ** exponents
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / lengths - low) / (high - low)
    smooth = smooth.clip(0, 1)
    factors: np.ndarray[Any, Any] = 1 / (smooth + (1 - smooth) / factor)
    return factors.astype(np.float32)


def write_header(writer: Any, config: dict[str, Any], head_dim: int) -> None:
    """The model's sizes. It gets no tokenizer: prompts are token ids."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_name("benchmark")
    writer.add_file_type(MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_tokenizer_model("none")


def convert(checkpoint: Path, target: Path) -> None:
    """Write ``target``."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(target, config["model_type"])
    write_header(writer, config, head_dim)
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rotation_factors(rope, head_dim))
    for name, tensor in read_tensors(checkpoint / "model.safetensors").items():
        if name in TOP_NAMES:
            new_name = TOP_NAMES[name]
        else:
            _, _, layer, *module, kind = name.split(".")
            new_name = f"blk.{layer}.{NAMES['.'.join(module)]}.{kind}"
        if config["model_type"] == "llama" and "q_proj" in name:
            tensor = interleave(tensor, heads)
        if config["model_type"] == "llama" and "k_proj" in name:
            tensor = interleave(tensor, kv_heads)
        if tensor.ndim == 1:
            wide = (tensor.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(new_name, wide)
        else:
            raw = np.ascontiguousarray(tensor).view(np.uint8)
            writer.add_tensor(new_name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
