"""DeepSeek-V2 and V3, whose files say "deepseek2", and models of their shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from headrace.weights.gguf.architectures.base import EXPERTS, FEED_FORWARD, Architecture
from headrace.weights.gguf.architectures.rope import read_rope
from headrace.weights.gguf.file import StoredTensor
from headrace.weights.gguf.recipes import Matrix, Piece, Recipe

_KEYS, _VALUES = "attn_k_b.weight", "attn_v_b.weight"
_SOFTMAX, _SIGMOID = 1, 2
"""How experts are scored, as files number it."""


class DeepseekV2(Architecture):
    """Converters cut what makes keys and values of the latent, and transpose the keys' part.

    Both parts are of one head after the other. Older files have the whole as it was.
    """

    inside: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.kv_b_proj",
        "attn_v_b": "self_attn.kv_b_proj",
        "attn_output": "self_attn.o_proj",
        **FEED_FORWARD,
        **EXPERTS,
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }

    def recipes(self, tensor: StoredTensor) -> dict[str, Recipe]:
        key, name = self.names(tensor)
        if key not in (_KEYS, _VALUES):
            return super().recipes(tensor)
        self.values.check_shape(tensor, 3)
        if key == _VALUES:
            return {}
        values = self.values.tensor(tensor.name.replace(_KEYS, _VALUES))
        if values.shape[0] != tensor.shape[0] or values.shape[-1] != tensor.shape[1]:
            raise self.values.fail(f"tensors {tensor.name!r} and {values.name!r} do not match")
        pieces = [
            piece
            for head in range(tensor.shape[0])
            for piece in (Piece(tensor, head, transposed=True), Piece(values, head))
        ]
        return {name: Recipe((Matrix(tuple(pieces)),))}

    def config(self) -> dict[str, Any]:
        values = self.values
        rotated = values.size("rope.dimension_count")
        # Where keys and values are cut, the plain keys are those of the latent.
        width = values.size("attention.key_length_mla", "attention.key_length")
        return {
            **values.general(),
            "hidden_size": values.size("embedding_length"),
            "intermediate_size": values.size("feed_forward_length"),
            "num_hidden_layers": values.layers(),
            "num_attention_heads": values.heads(),
            "num_key_value_heads": values.heads(),
            "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
            "q_lora_rank": values.count("attention.q_lora_rank", default=0) or None,
            "kv_lora_rank": values.size("attention.kv_lora_rank"),
            "qk_rope_head_dim": rotated,
            "qk_nope_head_dim": width - rotated,
            "v_head_dim": values.size("attention.value_length_mla", "attention.value_length"),
            "attention_bias": self.in_first_layer("attn_kv_a_mqa.bias"),
            **self._rope(rotated),
            **self._experts(),
        }

    def _rope(self, rotated: int) -> dict[str, Any]:
        """Of YaRN's two factors files have one, and in all released models the other is the same.

        Files have a tenth of it.
        """
        rope = read_rope(self.values, rotated)
        multiplier = self.values.number("rope.scaling.yarn_log_multiplier", default=0.0)
        if multiplier and "rope_scaling" in rope:
            factor = round(10 * multiplier, 6)
            rope["rope_scaling"] |= {"mscale": factor, "mscale_all_dim": factor}
        return rope

    def _experts(self) -> dict[str, Any]:
        values = self.values
        scoring = values.count("expert_gating_func", default=0) or _SOFTMAX
        groups = values.count("expert_group_count", default=0) or 1
        normalized = values.flag("expert_weights_norm", False)
        if scoring not in (_SOFTMAX, _SIGMOID) or (scoring == _SOFTMAX and normalized):
            raise values.fail(
                f"expert_gating_func {scoring} with expert_weights_norm {normalized} is not "
                "supported"
            )
        grouped = "group_limited_greedy" if groups > 1 else "greedy"
        return {
            "model_type": "deepseek_v3" if scoring == _SIGMOID else "deepseek_v2",
            "topk_method": "noaux_tc" if scoring == _SIGMOID else grouped,
            "first_k_dense_replace": values.count("leading_dense_block_count", default=0),
            "n_routed_experts": values.size("expert_count"),
            "num_experts_per_tok": values.size("expert_used_count"),
            "n_shared_experts": values.count("expert_shared_count", default=0) or None,
            "moe_intermediate_size": values.size("expert_feed_forward_length"),
            "routed_scaling_factor": values.number("expert_weights_scale", default=1.0) or 1.0,
            "norm_topk_prob": normalized,
            "n_group": groups,
            "topk_group": values.count("expert_group_used_count", default=0) or 1,
        }
