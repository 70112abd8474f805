"""What each architecture's files are in the words of Hugging Face."""

from __future__ import annotations

from typing import Any

from headrace.errors import CheckpointError
from headrace.registry import Registry
from headrace.weights.gguf.architectures.base import Architecture
from headrace.weights.gguf.architectures.hyperparameters import Hyperparameters
from headrace.weights.gguf.architectures.rope import ROPE_TENSORS
from headrace.weights.gguf.file import GGUFFile
from headrace.weights.gguf.recipes import Recipe

_HERE = "headrace.weights.gguf.architectures"

ARCHITECTURES = Registry(
    "architecture of a GGUF file",
    {
        "bert": f"{_HERE}.bert:Bert",
        "deepseek2": f"{_HERE}.deepseek:DeepseekV2",
        "falcon-h1": f"{_HERE}.mamba:FalconH1",
        "gemma2": f"{_HERE}.gemma:Gemma2",
        "gemma3": f"{_HERE}.gemma:Gemma3",
        "gpt-oss": f"{_HERE}.gpt_oss:GptOss",
        "gpt2": f"{_HERE}.gpt:Gpt2",
        "gptneox": f"{_HERE}.gpt:GptNeoX",
        "llama": f"{_HERE}.llama:Llama",
        "mamba2": f"{_HERE}.mamba:Mamba2",
        "phi3": f"{_HERE}.phi3:Phi3",
        "qwen2": f"{_HERE}.qwen:Qwen2",
        "qwen2moe": f"{_HERE}.qwen:Qwen2Moe",
        "qwen3": f"{_HERE}.qwen:Qwen3",
        "qwen3moe": f"{_HERE}.qwen:Qwen3Moe",
        "smollm3": f"{_HERE}.llama:SmolLM3",
    },
)
"""``general.architecture`` -> an ``Architecture``."""


def translate(file: GGUFFile) -> tuple[dict[str, Any], dict[str, Recipe]]:
    """What would be ``config.json``, and recipes by the names that tensors would have.

    Raises:
        CheckpointError: the architecture is unknown, metadata lack a value, or there are tensors
            that the architecture does not have.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture: Architecture = ARCHITECTURES.resolve(name)(Hyperparameters(file, name))
    recipes: dict[str, Recipe] = {}
    for tensor in file.tensors.values():
        if tensor.name not in ROPE_TENSORS:
            recipes |= architecture.recipes(tensor)
    return architecture.config(), recipes
