"""Gemma 2 and 3. Converters add 1 to all norm weights, which lack it in the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from headrace.weights.gguf.architectures.base import ATTENTION, HEAD_NORMS, Architecture
from headrace.weights.gguf.recipes import Matrix, Piece

_LAYER = {
    **ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Gemma(Architecture):
    """What both share."""

    def matrix(self, key: str, piece: Piece) -> Matrix:
        return Matrix((piece,), undo=_less_one if key.endswith("norm.weight") else None)

    def gemma_config(self, model_type: str, largest: int) -> dict[str, Any]:
        """Sizes and caps.

        Files do not say by what scores are divided. In the models of 27B, which have ``largest``
        layers, it is the share of the hidden state that a head has, in all others a head's width.
        """
        values = self.values
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        share = values.size("embedding_length") // values.heads()
        return {
            **self.decoder_config(model_type),
            **{name: values.optional_number(name) for name in caps},
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": share if values.layers() == largest else self.head_width(),
        }


class Gemma2(Gemma):
    """Every other layer, the first included, has a window."""

    inside: ClassVar[Mapping[str, str]] = _LAYER

    def config(self) -> dict[str, Any]:
        return {**self.gemma_config("gemma2", largest=46), **self.windows(2, default=4096)}


class Gemma3(Gemma):
    """Gemma 3, text: five layers in six have a window, and frequencies of their own.

    Converters cut off rows of the embedding for which there is no token.
    """

    inside: ClassVar[Mapping[str, str]] = {**_LAYER, **HEAD_NORMS}

    def config(self) -> dict[str, Any]:
        local = self.values.number("rope.freq_base_swa", default=10000.0)
        return {
            **self.gemma_config("gemma3_text", largest=62),
            **self.windows(6),
            "rope_local_base_freq": local,
        }


def _less_one(values: Tensor) -> Tensor:
    return values - 1
