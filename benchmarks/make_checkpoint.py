"""Make a checkpoint with random weights in the shape of a real model: speed does not see values.

    python benchmarks/make_checkpoint.py llama-3.2-1b

Nothing is downloaded; the tokenizer is the embedded model's, so prompts are best token ids.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from harness import CACHE, progress

from headrace.config import EngineConfig
from headrace.loading import embedded_model, quantize_model

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "narrow-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "llama-draft": {
        "vocab_size": 128256,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    "tiny-draft": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}


def ensure_checkpoint(shape: str) -> Path:
    """The directory of a bfloat16 checkpoint of that shape, made if it is not there."""
    import torch
    import transformers

    directory, partial = CACHE / shape, CACHE / f"{shape}.partial"
    if directory.exists():
        return directory
    progress(f"making {directory}")
    torch.manual_seed(0)
    options = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(**{**options, **SHAPES[shape]})
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_config(config)
    model.to(torch.bfloat16).save_pretrained(partial, max_shard_size="10GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, partial)
    return partial.rename(directory)


def ensure_packed(shape: str, weights: str = "bf16") -> Path:
    """The checkpoint in the packed layout, which is read where it is."""
    directory = CACHE / f"{shape}-{weights}"
    if not directory.exists():
        source = ensure_checkpoint(shape)
        progress(f"making {directory}")
        quantize_model(EngineConfig(model=str(source), weights=weights), directory)
    return directory


if __name__ == "__main__":
    print(ensure_checkpoint(sys.argv[1]))
