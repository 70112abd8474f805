"""Mamba-2, and Falcon-H1, which has attention beside it.

Of the mixer, converters leave out the convolution's dimension of 1, make the norm a matrix of
groups, and write -exp of ``A_log``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from headrace.weights.gguf.architectures.base import ATTENTION, Architecture
from headrace.weights.gguf.recipes import Matrix, Piece

_MIXER = {
    "ssm_in": "in_proj",
    "ssm_conv1d": "conv1d",
    "ssm_dt.bias": "dt_bias",
    "ssm_a": "A_log",
    "ssm_d": "D",
    "ssm_norm": "norm",
    "ssm_out": "out_proj",
}


class MambaMap(Architecture):
    """What both share."""

    def matrix(self, key: str, piece: Piece) -> Matrix:
        tensor = piece.tensor
        if key == "ssm_norm.weight":
            return Matrix((Piece(replace(tensor, shape=(math.prod(tensor.shape),))),))
        return Matrix((piece,), undo=_log_of_negative if key == "ssm_a" else None)


class Mamba2(MambaMap):
    """Mamba-2. Heads are what files call the rank of time steps."""

    outside: ClassVar[Mapping[str, str]] = {
        "token_embd": "backbone.embeddings",
        "output_norm": "backbone.norm_f",
        "output": "lm_head",
    }
    inside: ClassVar[Mapping[str, str]] = {
        "attn_norm": "norm",
        **{key: f"mixer.{name}" for key, name in _MIXER.items()},
    }
    layer = "backbone.layers.{}."

    def config(self) -> dict[str, Any]:
        values = self.values
        hidden, inner = values.size("embedding_length"), values.size("ssm.inner_size")
        heads = values.size("ssm.time_step_rank")
        return {
            "model_type": "mamba2",
            **values.general(),
            "hidden_size": hidden,
            "num_hidden_layers": values.layers(),
            "expand": inner // hidden if inner % hidden == 0 else inner / hidden,
            "num_heads": heads,
            "head_dim": inner // heads,
            "n_groups": values.size("ssm.group_count"),
            "state_size": values.size("ssm.state_size"),
            "conv_kernel": values.size("ssm.conv_kernel"),
            "use_bias": self.in_first_layer("ssm_in.bias"),
            "use_conv_bias": self.in_first_layer("ssm_conv1d.bias"),
            "layer_norm_epsilon": values.number("attention.layer_norm_rms_epsilon"),
        }


class FalconH1(MambaMap):
    """Falcon-H1. Converters multiply its multipliers into the weights, so that all are 1."""

    outside: ClassVar[Mapping[str, str]] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.final_layernorm",
        "output": "lm_head",
    }
    inside: ClassVar[Mapping[str, str]] = {
        **ATTENTION,
        **{key: f"mamba.{name}" for key, name in _MIXER.items()},
        "ffn_norm": "pre_ff_layernorm.weight",
        "ffn_gate": "feed_forward.gate_proj",
        "ffn_up": "feed_forward.up_proj",
        "ffn_down": "feed_forward.down_proj",
    }

    def config(self) -> dict[str, Any]:
        values = self.values
        inner, heads = values.size("ssm.inner_size"), values.size("ssm.time_step_rank")
        return {
            **self.decoder_config("falcon_h1"),
            **self.biases(),
            "mamba_d_ssm": inner,
            "mamba_n_heads": heads,
            "mamba_d_head": inner // heads,
            "mamba_n_groups": values.size("ssm.group_count"),
            "mamba_d_state": values.size("ssm.state_size"),
            "mamba_d_conv": values.size("ssm.conv_kernel"),
            "mamba_conv_bias": self.in_first_layer("ssm_conv1d.bias"),
            "mamba_proj_bias": self.in_first_layer("ssm_in.bias"),
            "projectors_bias": self.in_first_layer("ssm_out.bias"),
            "mamba_rms_norm": self.in_first_layer("ssm_norm.weight"),
            "mamba_norm_before_gate": False,
        }


def _log_of_negative(values: Tensor) -> Tensor:
    return (-values).log()
