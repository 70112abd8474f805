"""Llama's shape: Llama, Mistral, Mixtral, SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    Architecture,
)
from headrace.weights.gguf.recipes import Matrix, Piece, halves_apart


class TurnedInPairs(Architecture):
    """Heads whose pairs of elements were put side by side: converters permute query and key rows.

    Elements i and i + width / 2 of a head, which RoPE turns together, become 2i and 2i + 1.
    """

    def matrix(self, key: str, piece: Piece) -> Matrix:
        heads = {"attn_q": self.values.heads(), "attn_k": self._kv_heads()}.get(key.split(".")[0])
        if heads is None:
            return Matrix((piece,))
        weight = key.endswith(".weight")
        self.values.check_shape(piece.tensor, 2 if weight else 1, multiple_of=2 * heads)
        return Matrix((piece,), order=halves_apart(heads))

    def _kv_heads(self) -> int:
        return self.values.size("attention.head_count_kv", default=self.values.heads())


class Llama(TurnedInPairs):
    """Files of Mistral and Mixtral say "llama" too.

    Experts make it Mixtral, whose names are its own; a window makes it Mistral.
    """

    inside: ClassVar[Mapping[str, str]] = {
        **ATTENTION,
        **FEED_FORWARD,
        **{
            key: name.replace("mlp.", "block_sparse_moe.")
            .replace("gate_proj", "w1")
            .replace("down_proj", "w2")
            .replace("up_proj", "w3")
            for key, name in EXPERTS.items()
        },
    }

    def head_width(self) -> int:
        # Older files say it only so.
        values = self.values
        derived = values.size("embedding_length") // values.heads()
        return values.size("attention.key_length", "rope.dimension_count", default=derived)

    def config(self) -> dict[str, Any]:
        values = self.values
        window = values.count("attention.sliding_window", default=0)
        experts = values.count("expert_count", default=0)
        if experts:
            return {
                **self.decoder_config("mixtral"),
                "sliding_window": window or None,
                "num_local_experts": experts,
                "num_experts_per_tok": values.size("expert_used_count"),
            }
        if window:
            return {**self.decoder_config("mistral"), "sliding_window": window}
        return {**self.decoder_config("llama"), **self.biases()}


class SmolLM3(TurnedInPairs):
    """Every fourth layer does without RoPE; files do not say so."""

    def config(self) -> dict[str, Any]:
        return {
            **self.decoder_config("smollm3"),
            **self.biases(),
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        }
