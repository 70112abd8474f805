"""Tiny configurations of every architecture beyond Llama's shape, in which every feature is active.

Windows are shorter than the prompts of the tests, groups of experts are chosen from, recurrent
layers have several chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import transformers

VOCAB = 300
CONTEXT = 256
WINDOW = 20

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 0.05,  # large enough to be seen
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4,
}


def _gpt_oss() -> transformers.PreTrainedConfig:
    return transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 48},
        head_dim=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters={**YARN, "truncate": False},
    )


def _mamba2() -> transformers.PreTrainedConfig:
    names = ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return transformers.Mamba2Config(
        **{name: SIZES[name] for name in names},
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=24,
        n_groups=2,
        expand=2,
        layer_norm_epsilon=0.05,
        time_step_limit=(0.05, 2.0),
        chunk_size=32,
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
        mamba_chunk_size=32,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        embedding_multiplier=1.5,
        lm_head_multiplier=0.7,
        mlp_multipliers=[0.8, 1.2],
        ssm_multipliers=[0.9, 1.1, 1.3, 0.7, 1.2],
        ssm_in_multiplier=1.3,
        ssm_out_multiplier=0.8,
        key_multiplier=1.4,
        attention_in_multiplier=1.1,
        attention_out_multiplier=0.9,
    )


def _qwen3_next() -> transformers.PreTrainedConfig:
    return transformers.Qwen3NextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=32,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.25},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        shared_expert_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        **EXPERTS,
    )


def _gemma2() -> transformers.PreTrainedConfig:
    return transformers.Gemma2Config(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters=ROPE,
    )


def _gemma3() -> transformers.PreTrainedConfig:
    return transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 5},
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=WINDOW,
        layer_types=[*["sliding_attention"] * 2, "full_attention", *["sliding_attention"] * 2],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )


ARCHITECTURES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, head_dim=24, sliding_window=WINDOW, rope_parameters=ROPE
    ),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        **{**SIZES, "num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        rope_parameters=ROPE,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_parameters=ROPE,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES,
        rope_parameters=ROPE,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
        **EXPERTS,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=24, rope_parameters=ROPE, norm_topk_prob=True, **EXPERTS
    ),
    "qwen3_next": _qwen3_next,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": lambda: transformers.Phi3Config(
        **SIZES,
        sliding_window=WINDOW,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.75},
    ),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **SIZES,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            **FACTORS,
        },
    ),
    "smollm3": lambda: transformers.SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4}, no_rope_layers=[1, 0, 1, 0], rope_parameters=ROPE
    ),
    "smollm3-windows": lambda: transformers.SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4},
        use_sliding_window=True,
        sliding_window=WINDOW,
        rope_parameters=ROPE,
    ),
    "falcon_h1": _falcon_h1,
    "mamba2": _mamba2,
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **{**SIZES, **LATENT}, topk_method="group_limited_greedy", rope_parameters=ROPE
    ),
    "deepseek_v2-lite": lambda: transformers.DeepseekV2Config(
        **{**SIZES, **LATENT, "q_lora_rank": None},
        topk_method="greedy",
        rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.8},
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, **LATENT},
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "gpt_oss": _gpt_oss,
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        layer_norm_epsilon=0.05,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        layer_norm_eps=0.05,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.25},
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt_neox-sequential": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
        bos_token_id=None,
        eos_token_id=None,
    ),
}
"""Name -> configuration; names begin with the ``model_type``."""

WITH_LLAMA = (*ARCHITECTURES, "llama3", "qwen3")
"""Beside these, the plain ones of ``tests.support.checkpoints``."""

RECURRENT = ("mamba2", "falcon_h1", "qwen3_next")
"""Architectures whose layers keep a state of fixed size."""
