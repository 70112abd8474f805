"""The verifier: which guesses stay, so that what comes out is distributed as without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts.step import SampleState
from headrace.exec.sampling import wide
from headrace.exec.sampling.sampler import Sampler
from headrace.exec.sampling.steps import uniform_numbers

DRAW, ACCEPT, RESIDUAL = range(3)
"""What a random number is for."""


def numbers(
    states: Sequence[SampleState], level: int, purpose: int, device: torch.device
) -> Tensor:
    """``[R]`` in [0, 1): for each place in a sequence, level and purpose another one.

    Draws of level 0 are those of plain sampling. A place that is guessed again gets the same
    numbers: those of its first time have not touched anything that is left.
    """
    return torch.from_numpy(uniform_numbers(states, 3 * level + purpose)).to(device)


@dataclass(frozen=True, slots=True)
class Chain:
    """Tokens that were guessed to follow each other.

    Args:
        weights: for each token, the probabilities ``[width]`` that it was drawn with.
    """

    tokens: Sequence[int]
    weights: Sequence[Tensor]


def verify(
    chain: Chain, target: Tensor, usable: Sequence[bool], state: SampleState, level: int = 0
) -> list[int]:
    """The tokens of the chain that stay, and the one after them.

    Fast Inference from Transformers via Speculative Decoding, section 2.3 and appendix A.1: a
    guess x that was drawn from q stays with probability min(1, p(x) / q(x)); in place of the first
    that does not comes a draw from the positive part of p - q, and after the last one from p. Each
    token is then distributed as p. A greedy request's p is 1 at one token, which always comes out.

    Args:
        target: p at each place of the chain and after it, ``[length + 1, width]``.
        usable: for each place, whether p is one.
        state: of the sequence before the chain.
        level: of the hierarchy; its draws are independent of other levels'.

    Returns:
        Up to ``length + 1`` tokens; fewer by one if p is none where they end.
    """
    places = [state.after(chain.tokens[:count]) for count in range(len(target))]
    limits = numbers(places, level, ACCEPT, target.device).tolist()
    for place, (token, weights) in enumerate(zip(chain.tokens, chain.weights, strict=True)):
        if not usable[place]:
            return list(chain.tokens[:place])
        if float(target[place, token]) > limits[place] * float(weights[token]):
            continue
        left = (target[place] - weights).clamp_(min=0)
        # Rounding alone can reject where p is q.
        left = left if bool(left.any()) else target[place]
        return [*chain.tokens[:place], _draw(left, places[place], level, RESIDUAL)]
    end = [_draw(target[-1], places[-1], level, DRAW)] if usable[-1] else []
    return [*chain.tokens, *end]


def judge(
    sampler: Sampler,
    chains: Sequence[Chain],
    logits: Tensor,
    states: Sequence[SampleState],
    level: int,
) -> list[tuple[list[int], Tensor]]:
    """``verify`` for several sequences, by the logits of a model.

    Args:
        logits: at each place of the first chain and after it, then of the next one,
            ``[T, vocab]``; may be changed.
        states: of the sequences before the chains.

    Returns:
        For each, the tokens, and what they are distributed as, ``[length + 1, width]``.
    """
    places = [
        state.after(chain.tokens[:count])
        for chain, state in zip(chains, states, strict=True)
        for count in range(len(chain.tokens) + 1)
    ]
    target, usable = sampler.distributions(logits, places)
    judged, start = [], 0
    for chain, state in zip(chains, states, strict=True):
        end = start + len(chain.tokens) + 1
        part = target[start:end]
        judged.append((verify(chain, part, usable[start:end], state, level), part))
        start = end
    return judged


def _draw(weights: Tensor, state: SampleState, level: int, purpose: int) -> int:
    number = numbers([state], level, purpose, weights.device)
    return int(wide.locate(weights.unsqueeze(0), number))
