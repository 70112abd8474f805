"""DeepSeek-V3 and R1."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from headrace.models.deepseek_v2 import Model as DeepseekV2
from headrace.models.deepseek_v2 import keep_groups, read_groups
from headrace.models.layers.decoder import Parts
from headrace.models.layers.experts import Selection, read_chosen
from headrace.models.layers.latent_attention import LatentShape
from headrace.models.layers.values import read_number, read_size


class Model(DeepseekV2):
    """DeepSeek-V2 with another way to choose experts (DeepSeek-V3, section 2.1.2)."""

    @staticmethod
    def latent_shape(config: dict[str, Any]) -> LatentShape:
        return LatentShape.parse(config, interleaved=bool(config.get("rope_interleave", True)))

    @classmethod
    def selection(cls, parts: Parts, prefix: str) -> Selection:
        """Sigmoids decide, with a bias that balances the load and does not weigh."""
        raw = parts.raw
        experts = read_size(raw, "n_routed_experts")
        count, (groups, kept) = read_chosen(raw, experts), read_groups(raw, experts)
        factor = read_number(raw, "routed_scaling_factor", 1.0)
        normalized = bool(raw.get("norm_topk_prob", True))
        bias = parts.weights.tensor(prefix + "gate.e_score_correction_bias", (experts,)).float()

        def select(scores: Tensor) -> tuple[Tensor, Tensor]:
            shares = scores.sigmoid()
            biased = shares + bias
            best = biased.unflatten(1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
            chosen = keep_groups(biased, best, kept, -math.inf).topk(count, dim=-1).indices
            weights = shares.gather(1, chosen)
            if normalized:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return weights * factor, chosen

        return select
