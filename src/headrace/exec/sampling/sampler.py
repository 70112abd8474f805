"""The sampler: runs the chain, draws, and reports log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts.outputs import TokenLogprobs
from headrace.contracts.step import SampleState
from headrace.exec.sampling.steps import SamplingBatch, SamplingStep, default_steps


@dataclass(slots=True)
class Drawn:
    """One row's token, its log-probabilities if wanted, or why there is none."""

    token: int = -1
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Sampler:
    """Draws one token per row.

    The draw of a row is a function of its logits, its parameters, its seed and the number of
    tokens it has; it depends neither on time nor on other rows.
    """

    def __init__(self, steps: Sequence[SamplingStep] | None = None) -> None:
        self.steps = list(default_steps() if steps is None else steps)

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> list[Drawn]:
        """Tokens for ``logits`` ``[R, vocab]``, which may be changed.

        Log-probabilities are those of the unmodified logits. A row whose logits are not finite
        gets an error; the others are not affected.
        """
        highest, tokens = logits.max(dim=-1)
        finite = torch.isfinite(highest).tolist()
        plain = all(_takes_highest(state) for state in states)
        logprobs = _row_logprobs(logits, states) if any(map(_wants_logprobs, states)) else None
        if not plain or logprobs is not None:
            scores = logits.float()
        if not plain:
            batch = SamplingBatch.build(states, scores.device)
            if not all(finite):
                scores = scores.nan_to_num(0.0, 0.0, 0.0)
            for step in self.steps:
                if step.applies(batch):
                    scores = step(scores, batch)
            tokens = batch.draw(scores)
        drawn = [Drawn(token=token) for token in tokens.tolist()]
        for index, (row, ok) in enumerate(zip(drawn, finite, strict=True)):
            if not ok:
                row.error = "the logits are not finite (NaN or infinity)"
            elif logprobs is not None and _wants_logprobs(states[index]):
                top = states[index].params.logprobs
                row.logprobs = token_logprobs(logprobs[index : index + 1], [row.token], top or 0)[0]
        return drawn


def _takes_highest(state: SampleState) -> bool:
    """Whether the row's token is the plain argmax, with no step in between."""
    params = state.params
    return (
        params.greedy
        and params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and not params.logit_bias
        and not state.banned_token_ids
    )


def _wants_logprobs(state: SampleState) -> bool:
    return state.params.logprobs is not None


def _row_logprobs(logits: Tensor, states: Sequence[SampleState]) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def token_logprobs(logprobs: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Per row of ``logprobs`` ``[R, vocab]``: the token's value and rank, and the best ``top``."""
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    return [
        TokenLogprobs(token, value, rank, tuple(zip(ids, values, strict=True)))
        for token, value, rank, ids, values in zip(
            tokens,
            chosen.squeeze(1).tolist(),
            ranks.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        )
    ]
