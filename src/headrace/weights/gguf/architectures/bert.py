"""BERT, and RoBERTa, of whose table of positions converters cut off the rows that no token has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import Architecture
from headrace.weights.gguf.file import StoredTensor
from headrace.weights.gguf.recipes import Recipe

_CLASSIFIER = "cls."


class Bert(Architecture):
    """Embedders. What classifies their output is left out."""

    outside: ClassVar[Mapping[str, str]] = {
        "token_embd": "embeddings.word_embeddings",
        "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "token_embd_norm": "embeddings.LayerNorm",
    }
    inside: ClassVar[Mapping[str, str]] = {
        "attn_q": "attention.self.query",
        "attn_k": "attention.self.key",
        "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense",
        "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
        "layer_output_norm": "output.LayerNorm",
    }
    layer = "encoder.layer.{}."

    def recipes(self, tensor: StoredTensor) -> dict[str, Recipe]:
        return {} if tensor.name.startswith(_CLASSIFIER) else super().recipes(tensor)

    def config(self) -> dict[str, Any]:
        values = self.values
        return {
            "model_type": "bert",
            **values.general(),
            "max_position_embeddings": values.tensor("position_embd.weight").shape[0],
            "type_vocab_size": values.tensor("token_types.weight").shape[0],
            "hidden_size": values.size("embedding_length"),
            "intermediate_size": values.size("feed_forward_length"),
            "num_hidden_layers": values.layers(),
            "num_attention_heads": values.heads(),
            "layer_norm_eps": values.number("attention.layer_norm_epsilon"),
            "position_embedding_type": "absolute",
            "hidden_act": "gelu",
        }
