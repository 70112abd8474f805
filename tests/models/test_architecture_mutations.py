"""Parity of every architecture breaks by far when one of its features is switched off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.expected import Expected, difference, greedy, load, prompt_of
from tests.models.test_mutations import NOTICED, Mutation, config, exchanged, filled, rope
from tests.support.checkpoints import copy_checkpoint
from tests.support.logits import LogitsRecorder


def several(*names: str, value: float) -> Mutation:
    """All tensors whose names end in one of ``names`` become constant."""

    def mutate(directory: Path) -> None:
        for name in names:
            filled(name, value)(directory)

    return mutate


LATENT = ("deepseek_v2", "deepseek_v2-lite", "deepseek_v3")
WINDOWED = (
    *("mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss"),
    *("qwen2-windows", "smollm3-windows"),
)
MUTATIONS: dict[str, tuple[tuple[str, ...], Mutation]] = {
    "window": (WINDOWED, config(sliding_window=64)),
    "which layers have windows": (("gemma3_text",), config(layer_types=None)),
    "windows everywhere": (("gemma2",), config(layer_types=["sliding_attention"] * 4)),
    "number of experts": (
        ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", *LATENT),
        config(num_experts_per_tok=1),
    ),
    "shares of experts": (("qwen3_moe", "qwen3_next"), config(norm_topk_prob=False)),
    "shares of experts as they are": (("qwen2_moe",), config(norm_topk_prob=True)),
    "gate of the shared expert": (
        ("qwen2_moe", "qwen3_next"),
        filled("shared_expert_gate.weight", 0.0),
    ),
    "shared experts": (LATENT, several("shared_experts.down_proj.weight", value=0.0)),
    "groups of experts": (("deepseek_v2", "deepseek_v3"), config(topk_group=1)),
    "balance of experts": (("deepseek_v3",), filled("e_score_correction_bias", 0.0)),
    "weight of experts": (LATENT, config(routed_scaling_factor=1.0)),
    "norm of the latent": (LATENT, filled("kv_a_layernorm.weight", 1.0)),
    "norm of the query latent": (
        ("deepseek_v2", "deepseek_v3"),
        filled("q_a_layernorm.weight", 1.0),
    ),
    "pairs side by side": (("deepseek_v3",), config(rope_interleave=False)),
    "sharpness by YaRN": (("deepseek_v2-lite", "deepseek_v3"), rope(mscale_all_dim=0.0)),
    "factor of YaRN": (("deepseek_v2-lite", "deepseek_v3", "gpt_oss"), rope(factor=8.0)),
    "ramp of YaRN": (("deepseek_v2-lite", "gpt_oss"), rope(beta_fast=2.0)),
    "ends of the ramp": (("gpt_oss",), rope(truncate=True)),
    "soft cap of scores": (("gemma2",), config(attn_logit_softcapping=None)),
    "soft cap of logits": (("gemma2",), config(final_logit_softcapping=None)),
    "scale of scores": (("gemma2", "gemma3_text"), config(query_pre_attn_scalar=24)),
    "norms behind": (
        ("gemma2", "gemma3_text"),
        several("post_attention_layernorm.weight", "post_feedforward_layernorm.weight", value=0.0),
    ),
    "norm before": (("gemma2", "gemma3_text"), filled("pre_feedforward_layernorm.weight", 0.0)),
    "norms of heads": (
        ("gemma3_text", "qwen3_moe", "qwen3_next"),
        several("q_norm.weight", "k_norm.weight", value=1.0),
    ),
    "part of heads that turns": (
        ("phi3", "qwen3_next", "gpt_neox"),
        rope(partial_rotary_factor=1.0),
    ),
    "factors of LongRoPE": (("phi3-longrope",), rope(long_factor=[1.0] * 6)),
    "layers without positions": (("smollm3",), config(no_rope_layers=[1, 1, 1, 1])),
    "sinks": (("gpt_oss",), filled("sinks", -50.0)),
    "clamps": (("gpt_oss",), config(swiglu_limit=0.5)),
    "sharpness of the gate": (("gpt_oss",), config(swiglu_alpha=1.0)),
    "bias of the router": (("gpt_oss",), filled("router.bias", 0.0)),
    "biases of experts": (
        ("gpt_oss",),
        several("gate_up_proj_bias", "down_proj_bias", value=0.0),
    ),
    "gate before up": (("mixtral",), exchanged(".w1.", ".w3.")),
    "decay": (("mamba2", "falcon_h1", "qwen3_next"), filled("A_log", 0.5)),
    "bias of steps": (("mamba2", "falcon_h1", "qwen3_next"), filled("dt_bias", 0.0)),
    "skip": (("mamba2", "falcon_h1"), filled(".D", 0.0)),
    "convolution": (("mamba2", "falcon_h1", "qwen3_next"), filled("conv1d.weight", 0.2)),
    "bias of the convolution": (("mamba2", "falcon_h1"), filled("conv1d.bias", 0.0)),
    "limit of steps": (("mamba2",), config(time_step_limit=[0.0, 100.0])),
    "norm behind the scan": (
        ("mamba2",),
        several("mixer.norm.weight", value=1.0),
    ),
    "norm behind the parallel scan": (("falcon_h1",), filled("mamba.norm.weight", 1.0)),
    "norm behind the delta rule": (("qwen3_next",), filled("linear_attn.norm.weight", 1.0)),
    "gate before the norm": (("falcon_h1",), config(mamba_norm_before_gate=True)),
    "multiplier of the embedding": (("falcon_h1",), config(embedding_multiplier=1.0)),
    "multiplier of the head": (("falcon_h1",), config(lm_head_multiplier=1.0)),
    "multipliers of the feed-forward": (("falcon_h1",), config(mlp_multipliers=[1.0, 1.0])),
    "multipliers of the scan": (("falcon_h1",), config(ssm_multipliers=[1.0] * 5)),
    "multiplier into the scan": (("falcon_h1",), config(ssm_in_multiplier=1.0)),
    "multiplier out of the scan": (("falcon_h1",), config(ssm_out_multiplier=1.0)),
    "multiplier of keys": (("falcon_h1",), config(key_multiplier=1.0)),
    "multiplier into attention": (("falcon_h1",), config(attention_in_multiplier=1.0)),
    "multiplier out of attention": (("falcon_h1",), config(attention_out_multiplier=1.0)),
    "learned positions": (("gpt2",), filled("wpe.weight", 0.0)),
    "activation": (("gpt2",), config(activation_function="relu")),
    "activation by tanh": (("gpt_neox",), config(hidden_act="relu")),
    "layer norm": (("gpt2",), filled("ln_1.weight", 1.0)),
    "bias of the last norm": (("gpt2",), filled("ln_f.bias", 0.0)),
    "bias of norms": (("gpt_neox",), filled("layer_norm.bias", 0.0)),
    "bias of attention": (("gpt2",), filled("c_attn.bias", 0.0)),
    "parallel halves": (("gpt_neox",), config(use_parallel_residual=False)),
    "halves in turn": (("gpt_neox-sequential",), config(use_parallel_residual=True)),
}


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        pytest.param(name, mutation, id=f"{feature}-{name}")
        for feature, (names, mutation) in MUTATIONS.items()
        for name in names
    ],
)
def test_mutation_breaks_parity(
    name: str, mutation: Mutation, expectations: Callable[[str], Expected], tmp_path: Path
) -> None:
    expected = expectations(name)
    directory = copy_checkpoint(expected.directory, tmp_path / "mutated")
    mutation(directory)
    with load(directory) as llm:
        recorder = LogitsRecorder(llm)
        (output,) = llm.generate([prompt_of(120)], greedy(4))
    assert difference(expected, recorder, output) > NOTICED
