"""A tiny Llama checkpoint with random weights, written with safetensors and tokenizers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

VOCAB = 320
CONTEXT = 512
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, WIDTH = 64, 96, 3, 6, 2, 16

CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "eos_token_id": VOCAB - 1,
}


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in fp32 under which logits vary and attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN) * 4,
        "lm_head.weight": matrix(VOCAB, HIDDEN) * 3,
        "model.norm.weight": torch.rand(HIDDEN, generator=generator) + 0.5,
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.rand(HIDDEN, generator=generator) + 0.5
        weights[attention + "q_proj.weight"] = matrix(HEADS * WIDTH, HIDDEN) * 2
        weights[attention + "k_proj.weight"] = matrix(KV_HEADS * WIDTH, HIDDEN) * 2
        weights[attention + "v_proj.weight"] = matrix(KV_HEADS * WIDTH, HIDDEN)
        weights[attention + "o_proj.weight"] = matrix(HIDDEN, HEADS * WIDTH)
        weights[mlp + "gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[mlp + "up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[mlp + "down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    return weights


def write_tokenizer(directory: Path) -> None:
    """A ``tokenizer.json`` with one token per byte, the end of sequence, and fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={piece: number for number, piece in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{number}|>" for number in range(len(alphabet), VOCAB)])
    tokenizer.save(str(directory / "tokenizer.json"))


def write_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint's files; returns ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.to(dtype) for name, tensor in random_weights().items()}
    save_file(weights, directory / "model.safetensors")
    write_tokenizer(directory)
    return directory
