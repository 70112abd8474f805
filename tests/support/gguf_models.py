"""Tiny checkpoints of every architecture that GGUF files are read of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.support.architectures import (
    ARCHITECTURES,
    CONTEXT,
    EXPERTS,
    LATENT,
    ROPE,
    VOCAB,
    WINDOW,
    YARN,
)
from tests.support.architectures import SIZES as ARCHITECTURE_SIZES

SIZES = {**ARCHITECTURE_SIZES, "rms_norm_eps": 1e-5}
FEW_SIZES = {
    name: SIZES[name] for name in SIZES if name not in ("rms_norm_eps", "num_key_value_heads")
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _precise(name: str) -> transformers.PreTrainedConfig:
    """A configuration of the other tests, with an epsilon that a converter keeps exactly."""
    config = ARCHITECTURES[name]()
    config.rms_norm_eps = SIZES["rms_norm_eps"]
    return config


def _gemma3() -> transformers.PreTrainedConfig:
    kinds = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7},
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=kinds,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )


def _falcon_h1() -> transformers.PreTrainedConfig:
    return transformers.FalconH1Config(
        **SIZES,
        rope_parameters=ROPE,
        mamba_d_ssm=96,
        mamba_n_heads=6,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=24,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        time_step_limit=(0.0, 1e9),
    )


CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=ROPE),
    "llama-wide-heads": lambda: transformers.LlamaConfig(
        **SIZES, head_dim=24, tie_word_embeddings=True, rope_parameters={**ROPE, "factor": 3.0}
    ),
    "llama-biases": lambda: transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "mixtral": lambda: _precise("mixtral"),
    "smollm3": lambda: transformers.SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4}, no_rope_layers=[1, 1, 1, 0], rope_parameters=ROPE
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen2-tied": lambda: transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, rope_parameters=ROPE
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, rope_parameters=ROPE, shared_expert_intermediate_size=40, **EXPERTS
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=24, rope_parameters=ROPE),
    "qwen3_moe": lambda: _precise("qwen3_moe"),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters=ROPE,
    ),
    "gemma3_text": _gemma3,
    "phi3": lambda: _precise("phi3"),
    "phi3-longrope": lambda: _precise("phi3-longrope"),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **FEW_SIZES, rope_parameters={**ROPE, "partial_rotary_factor": 0.25}
    ),
    "gpt_neox-sequential": lambda: transformers.GPTNeoXConfig(
        **FEW_SIZES,
        use_parallel_residual=False,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=24,
        n_groups=2,
        expand=2,
        time_step_limit=(0.0, 1e9),
    ),
    "falcon_h1": _falcon_h1,
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **{**SIZES, **LATENT}, topk_method="group_limited_greedy", rope_parameters=ROPE
    ),
    "deepseek_v2-lite": lambda: transformers.DeepseekV2Config(
        **{**SIZES, **LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        topk_method="greedy",
        rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, **LATENT},
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 48, "num_hidden_layers": 3},
        head_dim=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters={**YARN, "truncate": False},
    ),
    "bert": lambda: transformers.BertConfig(**FEW_SIZES),
}


def make_model(config: transformers.PreTrainedConfig) -> Any:
    """A model of transformers with random weights, biases and buffers."""
    torch.manual_seed(0)
    encoder = config.model_type == "bert"
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(-1.0, 1.0)
    return model


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """What the original holds, apart from what the converter leaves out."""
    tensors = load_file(directory / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
