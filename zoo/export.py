"""Writing a trained model as a directory that any Llama implementation loads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from zoo.model import LanguageModel, ModelConfig
from zoo.tokenizer import save_tokenizer, token_id

LARGEST_FILE = 7_500_000
"""Bytes of weights in one file."""


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write one JSON object with a final line end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export_model(model: LanguageModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Write configuration, tokenizer and bfloat16 weights, the tied embedding once."""
    directory.mkdir(parents=True, exist_ok=True)
    end_of_text, pad, end_of_turn = (
        token_id(tokenizer, token) for token in ("<|endoftext|>", "<|pad|>", "<|end|>")
    )
    stops = [end_of_text, end_of_turn]
    write_json(model.config.to_hugging_face(end_of_text, pad), directory / "config.json")
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": stops,
        "pad_token_id": pad,
    }
    write_json(generation, directory / "generation_config.json")
    save_tokenizer(tokenizer, directory, model.config.max_position_embeddings)
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    write_weights(weights, directory)


def write_weights(weights: dict[str, Tensor], directory: Path) -> None:
    """Write tensors to one file, or to several of at most ``LARGEST_FILE`` bytes with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in weights.items():
        if sum(v.nbytes for v in shards[-1].values()) + value.nbytes > LARGEST_FILE:
            shards.append({})
        shards[-1][name] = value
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        # Replaced as a whole, because a process that has mapped the old weights must keep them.
        temporary = directory / f"{name}.partial"
        temporary.write_bytes(save(shard, metadata={"format": "pt"}))
        temporary.replace(directory / name)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(index, directory / "model.safetensors.index.json")


def load_model(directory: Path) -> LanguageModel:
    """Load an exported model in float32; raises RuntimeError if tensors lack or do not fit."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = LanguageModel(ModelConfig.from_hugging_face(config))
    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        weights |= load_file(file)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
