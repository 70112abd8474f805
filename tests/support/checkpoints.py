"""Tiny checkpoints with random weights, made by transformers, in which every feature is active."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from tests.support.architectures import ARCHITECTURES, CONTEXT, VOCAB

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 0.05,  # large enough to be seen
}
GROUPED = {"num_key_value_heads": 2}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
# Of the eight frequencies of a head of 16, some are kept, one is blended, the others are divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**options: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**{**SIZES, "rope_parameters": DEFAULT_ROPE, **options})


def _qwen2(**options: Any) -> transformers.PreTrainedConfig:
    return transformers.Qwen2Config(**{**SIZES, "rope_parameters": DEFAULT_ROPE, **options})


def _qwen3(**options: Any) -> transformers.PreTrainedConfig:
    options = {"head_dim": 24, "rope_parameters": DEFAULT_ROPE, **options}
    return transformers.Qwen3Config(**{**SIZES, **options})


CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama2": lambda: _llama(num_key_value_heads=4),
    "llama3": lambda: _llama(**GROUPED, rope_parameters=LLAMA3_ROPE),
    "llama3-tied": lambda: _llama(**GROUPED, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": lambda: _llama(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _llama(**GROUPED, rope_parameters=LINEAR_ROPE),
    "qwen2": lambda: _qwen2(**GROUPED),
    "qwen2-tied": lambda: _qwen2(num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": lambda: _qwen3(**GROUPED),
    "qwen3-tied": lambda: _qwen3(**GROUPED, attention_bias=True, tie_word_embeddings=True),
}
"""One configuration for each thing that Llama's shape can have, by name."""

ALL_CONFIGS = {**CONFIGS, **ARCHITECTURES}

_DRAWN = ("e_score_correction_bias",)
"""Buffers that are weights."""


def make_model(config: transformers.PreTrainedConfig, seed: int = 0) -> Any:
    """A model of transformers in fp32 whose weights all matter.

    Biases are not 0, norm weights are not 1, attention is not uniform.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith(_DRAWN) and not parameter.requires_grad:
                continue
            if name.endswith(("bias", "sinks", ".D")):
                parameter.normal_(std=0.5)
            elif name.endswith("A_log"):
                parameter.uniform_(-1.0, 1.0)
            elif "conv1d" in name:
                parameter.normal_(std=0.5)
            elif "norm" in name or ".ln_" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                # Small, lest the residual stream carry each token through to a head that is tied.
                parameter.normal_(std=0.25)
            else:
                # Experts lie in three dimensions, the columns last or last but one.
                columns = parameter.shape[1] if parameter.ndim == 2 else min(parameter.shape[1:])
                parameter.normal_(std=1 / math.sqrt(columns))
    return model.eval()


def write_tokenizer(directory: Path, extra_tokens: int = 0) -> None:
    """A ``tokenizer.json`` with one token per byte, an end of sequence, and ``<|extra N|>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = [f"<|extra {number}|>" for number in range(extra_tokens)]
    tokenizer.add_special_tokens(["<|end|>", *extra])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def save_checkpoint(model: Any, directory: Path, **options: Any) -> Path:
    """Write a model of transformers and a tokenizer; ``options`` go to ``save_pretrained``."""
    model.save_pretrained(directory, **options)
    write_tokenizer(directory)
    return directory


def make_checkpoint(directory: Path, name: str = "llama3", **options: Any) -> Path:
    """A checkpoint of the configuration ``name``."""
    return save_checkpoint(make_model(ALL_CONFIGS[name]()), directory, **options)


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A copy to be altered."""
    shutil.copytree(source, target)
    return target


def edit_config(directory: Path, removed: tuple[str, ...] = (), **changed: Any) -> Path:
    """Change ``config.json`` in place."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changed}
    for key in removed:
        config.pop(key, None)
    file.write_text(json.dumps(config))
    return directory


def edit_tensors(
    directory: Path, edit: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> Path:
    """Replace the tensors of a checkpoint of one file by what ``edit`` makes of them."""
    file = directory / "model.safetensors"
    # Copies, since the tensors read are views of the file that is written.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({n: t.contiguous() for n, t in edit(tensors).items()}, file, {"format": "pt"})
    return directory


def to_old_style(directory: Path) -> Path:
    """Write ``config.json`` as checkpoints did until 2025: ``rope_theta`` and ``rope_scaling``,
    ``torch_dtype``, and no width of a head where it follows from other sizes.
    """
    config = json.loads((directory / "config.json").read_text())
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    if scaling["rope_type"] == "linear":
        scaling["type"] = scaling.pop("rope_type")
    plain = scaling.get("rope_type") == "default"
    derived = config["hidden_size"] // config["num_attention_heads"]
    implied = ("head_dim",) if config.get("head_dim") == derived else ()
    return edit_config(
        directory,
        removed=("rope_parameters", "dtype", *implied),
        rope_theta=theta,
        rope_scaling=None if plain else scaling,
        torch_dtype=config["dtype"],
    )
