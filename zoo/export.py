"""Writing a trained model as a directory that any Llama implementation loads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from zoo.model import LanguageModel, ModelConfig
from zoo.tokenizer import save_tokenizer, token_id


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
    # Replaced as a whole, because a process that has mapped the old weights must keep them.
    temporary = directory / "model.safetensors.partial"
    temporary.write_bytes(save(weights, metadata={"format": "pt"}))
    temporary.replace(directory / "model.safetensors")


def load_model(directory: Path) -> LanguageModel:
    """Load an exported model in float32; raises RuntimeError if tensors lack or do not fit."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = LanguageModel(ModelConfig.from_hugging_face(config))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
