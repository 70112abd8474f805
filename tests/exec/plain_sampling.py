"""Sampling as its definitions read: one row, one token at a time, in fp64, with full sorts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import SampleState

Row = npt.NDArray[np.float64]

END = 3
"""The token that ends a sequence."""


def make_state(
    seed: int = 0, prompt: tuple[int, ...] = (0, 1), output: tuple[int, ...] = (), **params: object
) -> SampleState:
    """A sequence that is sampled with ``params``."""
    return SampleState(SamplingParams(**params), list(prompt), list(output), seed, (END,))


def changed_scores(logits: Row, state: SampleState) -> Row:
    """Penalties, bias and bans."""
    params, scores = state.params, [float(x) for x in logits]
    for token in range(len(scores)):
        count = state.output_token_ids.count(token)
        if count or token in state.prompt_token_ids:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        if count:
            scores[token] -= params.presence_penalty + params.frequency_penalty * count
        scores[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in state.end_token_ids and len(state.output_token_ids) < params.min_tokens:
            scores[token] = -np.inf
    return np.array(scores)


def probabilities(logits: Row, state: SampleState) -> Row:
    """The distribution that the next token is drawn from."""
    params, scores = state.params, changed_scores(logits, state)
    if params.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    weights = np.exp((scores - scores.max()) / params.temperature)
    if params.top_k:
        last = np.sort(weights)[::-1][min(params.top_k, len(weights)) - 1]
        weights = np.where(weights >= last, weights, 0)
    weights = np.where(weights >= params.min_p * weights.max(), weights, 0)
    if params.top_p < 1:
        weights = np.where(weights >= nucleus_edge(weights, params.top_p), weights, 0)
    return weights / weights.sum()


def nucleus_edge(weights: Row, share: float) -> float:
    """The least weight of the smallest set of likeliest tokens that holds ``share`` of all."""
    ordered = np.sort(weights)[::-1]
    sums = ordered.cumsum()
    return float(ordered[np.argmax(sums >= share * sums[-1])])
