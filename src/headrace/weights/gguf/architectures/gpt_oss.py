"""gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import ATTENTION, Architecture
from headrace.weights.gguf.file import StoredTensor
from headrace.weights.gguf.recipes import Matrix, Piece, Recipe, in_turn

_GATE, _UP, _DOWN = (f"ffn_{part}_exps" for part in ("gate", "up", "down"))


class GptOss(Architecture):
    """Converters transpose the experts' weights, and cut gate and up, whose rows come in turn.

    The blocks of the original, which are of MXFP4 as well, they put in ggml's order.
    """

    inside: ClassVar[Mapping[str, str]] = {
        **ATTENTION,
        "attn_sinks.weight": "self_attn.sinks",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
        **{
            f"{part}{stored}": f"mlp.experts.{name}{ending}"
            for part, name in ((_GATE, "gate_up_proj"), (_UP, "gate_up_proj"), (_DOWN, "down_proj"))
            for stored, ending in ((".weight", ""), (".bias", "_bias"))
        },
    }

    def recipes(self, tensor: StoredTensor) -> dict[str, Recipe]:
        key, name = self.names(tensor)
        part, _, ending = key.partition(".")
        if part not in (_GATE, _UP, _DOWN):
            return super().recipes(tensor)
        if part == _UP:
            return {}
        weight, tensors = ending == "weight", [tensor]
        if part == _GATE:
            tensors.append(self.values.tensor(tensor.name.replace(_GATE, _UP)))
        for one in tensors:
            self.values.check_shape(one, 3 if weight else 2)
        if tensors[-1].shape != tensor.shape:
            raise self.values.fail(f"tensor {tensors[-1].name!r} has not {_GATE}'s shape")
        matrices = tuple(
            Matrix(
                tuple(Piece(one, expert) for one in tensors),
                order=in_turn(len(tensors)),
                transposed=weight,
            )
            for expert in range(tensor.shape[0])
        )
        return {name: Recipe(matrices, stacked=True)}

    def config(self) -> dict[str, Any]:
        values = self.values
        config = self.decoder_config("gpt_oss")
        if "rope_scaling" in config:
            # Of YaRN's ramp the ends are not rounded in this architecture; files do not say so.
            config["rope_scaling"] |= {"truncate": False}
        return {
            **config,
            **self.windows(2),
            "intermediate_size": values.size("expert_feed_forward_length", "feed_forward_length"),
            "attention_bias": self.in_first_layer("attn_q.bias"),
            "num_local_experts": values.size("expert_count"),
            "num_experts_per_tok": values.size("expert_used_count"),
            "swiglu_limit": 7.0,
        }
