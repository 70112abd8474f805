"""Heads that look for what came after the same token before, as weights to begin training with.

They form by themselves, but late ("In-context Learning and Induction Heads", section on the phase
change): tens of millions of tokens are spent on what two matrices can say. In the first layer, two
heads attend to the token before and to the one before that. In the second, one head compares the
token at hand with the token before each other one, and another the token before that at hand with
the token two before each other one. Training goes on from there and may change all of it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.model import Attention, LanguageModel, rotary_tables, rotate

BACK = (1, 2)
"""How many tokens back the heads of the first layer attend to."""
SHARE = 0.7
"""Of the size of an embedding, that of its part that is the same for all tokens."""
FREQUENCIES = 6
"""The highest ones; they tell near positions apart."""
SHARPNESS = 7.0
"""Size of queries and keys at each of these frequencies."""
TURNING = 0.5
"""Share of a head's elements, those that turn most, which are left out when tokens are compared:
the others have turned little between places that are hundreds of tokens apart."""
MATCH_SCORE = 9.0
"""Mean score of the same token, to which scales are set."""


@dataclass(frozen=True)
class Match:
    """A head of the second layer.

    Args:
        head: of the queries.
        query_back, key_back: whose token is compared: so many before; 0 is the one at hand.
    """

    head: int
    query_back: int
    key_back: int


def matches(groups: int, group_heads: int) -> list[Match]:
    """Return the heads that compare, each with keys of its own."""
    every = [Match(0, 1, 2), Match(group_heads, 0, 1)]
    return every[: min(groups, len(every))]


@torch.no_grad()
def add_induction(model: LanguageModel) -> None:
    """Change freshly initialized weights in place; the model has two layers and heads or more."""
    config = model.config
    embedding = model.model.embed_tokens.weight
    deviation = float(embedding.std())
    constant = SHARE * deviation * math.sqrt(config.hidden_size)
    embedding[:, 0] = constant
    first, second = (model.model.layer(i).self_attn for i in (0, 1))
    normalized = constant / math.hypot(deviation, constant / math.sqrt(config.hidden_size))
    look_back(first, config.rope_theta, SHARPNESS / normalized)
    write(first, deviation)
    group_heads = config.num_attention_heads // config.num_key_value_heads
    for match in matches(config.num_key_value_heads, group_heads):
        compare(model, first, second, match)


def by_head(weight: Tensor, width: int) -> Tensor:
    """Rows of a projection as ``[heads, width, hidden_size]``."""
    return weight.view(-1, width, weight.shape[1])


def look_back(layer: Attention, theta: float, gain: float) -> None:
    """Have the first heads attend to the tokens ``BACK``, and hand on the same of each."""
    width = layer.head_dim
    angles = theta ** (-torch.arange(0, width, 2).float() / width)[:FREQUENCIES]
    queries, keys, values = (
        by_head(projection.weight, width)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    groups = len(queries) // len(keys)
    for head, back in enumerate(BACK):
        queries[head], keys[head // groups] = 0.0, 0.0
        keys[head // groups, : len(angles), 0] = gain
        queries[head, : len(angles), 0] = gain * torch.cos(-back * angles)
        queries[head, width // 2 : width // 2 + len(angles), 0] = gain * torch.sin(-back * angles)
        values[head // groups] = values[0]
        values[head // groups, :, 0] = 0.0


def write(layer: Attention, deviation: float) -> None:
    """Have what these heads hand on be no smaller in the stream than embeddings are."""
    written = layer.o_proj.weight.view(layer.o_proj.weight.shape[0], -1, layer.head_dim)
    size = float(written[:, : len(BACK)].std()) * math.sqrt(layer.head_dim)
    written[:, : len(BACK)] *= max(1.0, deviation / size)


def code(layer: Attention, back: int) -> Tensor:
    """What reads, of the stream behind the first layer, the token so many before."""
    width = layer.head_dim
    if back == 0:
        return by_head(layer.v_proj.weight, width)[0]
    written = layer.o_proj.weight.view(layer.o_proj.weight.shape[0], -1, width)
    return written[:, BACK.index(back)].T


def compare(model: LanguageModel, first: Attention, second: Attention, match: Match) -> None:
    """Have a head of the second layer attend where its two tokens are the same."""
    width, groups = first.head_dim, second.heads // second.key_value_heads
    queries, keys = (by_head(p.weight, width) for p in (second.q_proj, second.k_proj))
    for target, back in (
        (queries[match.head], match.query_back),
        (keys[match.head // groups], match.key_back),
    ):
        reading = code(first, back).clone().view(2, width // 2, -1)
        reading[:, : round(width // 2 * TURNING)] = 0.0
        target.copy_((reading / reading.norm() * math.sqrt(width)).view(width, -1))
    score = mean_score(model, second, match)
    queries[match.head] *= MATCH_SCORE / score


def mean_score(model: LanguageModel, layer: Attention, match: Match) -> float:
    """Return the score of a head of the second layer between places of the same tokens."""
    config, period = model.config, 32
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(config.vocab_size, (8, period), generator=generator)
    tokens = once.repeat(1, 2)
    hidden = model.model.embed_tokens(tokens)
    cosine, sine = rotary_tables(config, tokens.shape[1], tokens.device)
    hidden = model.model.layer(0)(hidden, cosine, sine)
    hidden = model.model.layer(1).input_layernorm(hidden)
    groups = layer.heads // layer.key_value_heads

    def heads(projection: torch.nn.Linear, head: int) -> Tensor:
        states: Tensor = projection(hidden).view(*hidden.shape[:2], -1, layer.head_dim)
        return rotate(states[:, None, :, head], cosine, sine)[:, 0]

    queries = heads(layer.q_proj, match.head)[:, period + 2 :]
    shift = match.key_back - match.query_back
    keys = heads(layer.k_proj, match.head // groups)[:, 2 + shift : period + shift]
    scores = (queries * keys).sum(-1) / math.sqrt(layer.head_dim)
    return float(scores.mean())
