"""Weights to begin with: heads that look back, and heads that find the same token again."""

import math

import pytest
import torch
from torch import Tensor

from zoo.induction import BACK, add_induction, matches
from zoo.model import (
    Attention,
    LanguageModel,
    ModelConfig,
    initialize,
    rotary_tables,
    rotate,
)

PERIOD = 48
SHAPE = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 256}


def attention(layer: Attention, hidden: Tensor, config: ModelConfig) -> Tensor:
    """Probabilities ``[batch, heads, length, length]``."""
    length, width = hidden.shape[1], config.head_dim
    angles = rotary_tables(config, length, hidden.device)

    def heads(projection: torch.nn.Linear) -> Tensor:
        states = projection(hidden).view(*hidden.shape[:2], -1, width).transpose(1, 2)
        return rotate(states, *angles)

    keys = heads(layer.k_proj).repeat_interleave(layer.heads // layer.key_value_heads, 1)
    scores = heads(layer.q_proj) @ keys.transpose(-1, -2) / math.sqrt(width)
    return scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf).softmax(-1)


@pytest.mark.parametrize("deviation", [0.02, 0.5])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (2, 1)])
def test_heads_attend_where_they_are_meant_to(heads: int, groups: int, deviation: float) -> None:
    config = ModelConfig(**SHAPE, num_attention_heads=heads, num_key_value_heads=groups)
    plain, model = LanguageModel(config), LanguageModel(config)
    for each in (plain, model):
        initialize(each, 0, deviation)
    add_induction(model)
    tokens = torch.randint(512, (4, PERIOD), generator=torch.Generator().manual_seed(1))
    found, chance = ([] for _ in range(2))
    for each, masses in ((model, found), (plain, chance)):
        with torch.no_grad():
            hidden = each.model.embed_tokens(tokens.repeat(1, 2))
            first, second = each.model.layer(0), each.model.layer(1)
            looks = attention(first.self_attn, first.input_layernorm(hidden), config)
            later = torch.arange(4, 2 * PERIOD)
            masses += [float(looks[:, h, later, later - b].mean()) for h, b in enumerate(BACK)]
            hidden = first(hidden, *rotary_tables(config, 2 * PERIOD, tokens.device))
            finds = attention(second.self_attn, second.input_layernorm(hidden), config)
            match = matches(groups, heads // groups)[0]
            later = torch.arange(PERIOD + 4, 2 * PERIOD - 2)
            place = later - PERIOD + match.key_back - match.query_back
            masses.append(float(finds[:, match.head, later, place].mean()))
    assert min(found[:2]) > 0.9 and found[2] > 0.2
    assert max(chance) < 0.1


def test_the_same_weights_again() -> None:
    config = ModelConfig(**SHAPE)
    models = [LanguageModel(config) for _ in range(2)]
    for model in models:
        initialize(model, 3, 0.5)
        add_induction(model)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
