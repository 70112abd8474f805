"""What the maps of all architectures share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.hyperparameters import Hyperparameters
from headrace.weights.gguf.architectures.rope import read_rope
from headrace.weights.gguf.file import StoredTensor
from headrace.weights.gguf.recipes import Matrix, Piece, Recipe

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")

ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
"""Attention as most decoders have it, and the norm before it."""
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FEED_FORWARD = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A gated feed-forward as most decoders have it, and the norm before it."""
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
"""A router, and experts that files hold in one tensor."""


class Architecture(ABC):
    """How files of an architecture are read in the words of Hugging Face.

    Tables give names without the endings ``.weight`` and ``.bias``, which stay, or with them. Names
    with ``{expert}`` are of the parts of a tensor.
    """

    outside: ClassVar[Mapping[str, str]] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    """Names of tensors that are in no layer."""
    inside: ClassVar[Mapping[str, str]] = {**ATTENTION, **FEED_FORWARD}
    """Names of tensors in a layer, without its prefix."""
    layer: ClassVar[str] = "model.layers.{}."
    """Prefix of a layer."""

    def __init__(self, values: Hyperparameters) -> None:
        self.values = values

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What would be ``config.json``. Raises CheckpointError."""

    def matrix(self, key: str, piece: Piece) -> Matrix:
        """What undoes the converter's changes of a tensor, or of an expert's part of it.

        Args:
            key: the tensor's name, without its layer.
        """
        return Matrix((piece,))

    def recipes(self, tensor: StoredTensor) -> dict[str, Recipe]:
        """What is made of a tensor, by name.

        Raises:
            CheckpointError: the architecture has no such tensor, or not of its shape.
        """
        key, name = self.names(tensor)
        if "{expert}" not in name:
            return {name: Recipe((self.matrix(key, Piece(tensor)),))}
        self.values.check_shape(tensor, 3)
        return {
            name.format(expert=part): Recipe((self.matrix(key, Piece(tensor, part)),))
            for part in range(tensor.shape[0])
        }

    def names(self, tensor: StoredTensor) -> tuple[str, str]:
        """A tensor's name without its layer, and its name in a Hugging Face checkpoint."""
        match = _LAYER.fullmatch(tensor.name)
        key = tensor.name if match is None else match[2]
        table = self.outside if match is None else self.inside
        stem, dot, ending = key.rpartition(".")
        if key in table:
            name = table[key]
        elif stem in table and ending in ("weight", "bias"):
            name = table[stem] + dot + ending
        else:
            raise self.values.fail(
                f"tensor {tensor.name!r} is none that this version of Headrace knows of the "
                "architecture"
            )
        return key, name if match is None else self.layer.format(match[1]) + name

    def in_first_layer(self, name: str) -> bool:
        """Whether the first layer has that tensor."""
        return f"blk.0.{name}" in self.values

    def head_width(self) -> int:
        """Elements of a head of queries or keys."""
        derived = self.values.size("embedding_length") // self.values.heads()
        return self.values.size("attention.key_length", default=derived)

    def decoder_config(self, model_type: str, *, partial_rope: bool = False) -> dict[str, Any]:
        """What most decoders have in ``config.json``."""
        values, width = self.values, self.head_width()
        return {
            "model_type": model_type,
            **values.general(),
            "hidden_size": values.size("embedding_length"),
            "intermediate_size": values.size("feed_forward_length"),
            "num_hidden_layers": values.layers(),
            "num_attention_heads": values.heads(),
            "num_key_value_heads": values.size("attention.head_count_kv", default=values.heads()),
            "head_dim": width,
            "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
            **read_rope(values, width, partial=partial_rope),
        }

    def biases(self) -> dict[str, bool]:
        """Whether attention and feed-forward have them, as Llama's shape says it."""
        return {
            "attention_bias": self.in_first_layer("attn_q.bias"),
            "mlp_bias": self.in_first_layer("ffn_up.bias"),
        }

    def windows(self, period: int, default: int = 0) -> dict[str, Any]:
        """Width of windows, and which layers have one: of each ``period``, all but the last.

        Args:
            default: width where the file has none; 0: there are then no windows.
        """
        values, key = self.values, "attention.sliding_window_pattern"
        width = values.count("attention.sliding_window", default=default)
        slides = values.per_layer(key)
        if slides is None:
            period = values.count(key, default=period)
            slides = [not period or i % period < period - 1 for i in range(values.layers())]
        kinds = ["sliding_attention" if width and slide else "full_attention" for slide in slides]
        return {"sliding_window": width or None, "layer_types": kinds}
