"""The sampler: runs the chain, draws, and reports log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.contracts.outputs import TokenLogprobs
from headrace.contracts.step import SampleState
from headrace.exec.sampling import wide
from headrace.exec.sampling.steps import (
    Candidates,
    Cut,
    ScoreStep,
    column,
    default_cuts,
    default_steps,
    uniform_numbers,
)
from headrace.ops.selection import Selection

NOT_FINITE = "no token can be drawn: the logits are not finite (NaN or infinity)"
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(slots=True)
class Drawn:
    """One row's token, its log-probabilities if wanted, or why there is none."""

    token: int = -1
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Sampler:
    """Draws one token per row: changes of the scores, temperature, cuts, the draw.

    The draw of a row is a function of its logits, its parameters, its seed and the number of
    tokens it has; it depends neither on time nor on other rows.
    """

    def __init__(
        self,
        steps: Sequence[ScoreStep] | None = None,
        cuts: Sequence[Cut] | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._selection = selection or Selection()
        self.steps = list(default_steps() if steps is None else steps)
        self.cuts = list(default_cuts() if cuts is None else cuts)

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> list[Drawn]:
        """Tokens for ``logits`` ``[R, vocab]``, which may be changed.

        Log-probabilities are those of the unmodified logits. A row whose logits are not finite
        gets an error; the others are not affected.
        """
        reporting = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        logprobs = _logprobs(logits, reporting) if reporting else None
        scores, highest, tokens, usable = self._change(logits, states)
        drawing = [i for i, s in enumerate(states) if usable[i] and not s.params.greedy]
        cut = [i for i in drawing if any(cut.asked(states[i]) for cut in self.cuts)]
        free = [i for i in drawing if i not in cut]
        for rows, draw in ((free, self._draw_freely), (cut, self._draw_cut)):
            if rows:
                index = torch.tensor(rows, device=scores.device)
                shifted = wide.take(scores, index) - wide.take(highest, index)
                tokens[index] = draw(shifted, [states[row] for row in rows])
        drawn = [
            Drawn(token) if ok else Drawn(error=NOT_FINITE)
            for token, ok in zip(tokens.tolist(), usable, strict=True)
        ]
        if logprobs is not None:
            _report(logprobs, [drawn[row] for row in reporting], [states[row] for row in reporting])
        return drawn

    def distributions(
        self, logits: Tensor, states: Sequence[SampleState]
    ) -> tuple[Tensor, list[bool]]:
        """The probabilities with which ``sample`` would draw each token of each row.

        Args:
            logits: ``[R, vocab]``, which may be changed.

        Returns:
            fp32 ``[R, width]``, the vocabulary padded to whole blocks, and for each row whether its
            logits are finite; else the row is zero.
        """
        scores, highest, tokens, usable = self._change(logits, states)
        weights = torch.zeros_like(scores)
        for row, state in enumerate(states):
            if usable[row] and state.params.greedy:
                weights[row, tokens[row]] = 1.0
        drawing = [i for i, s in enumerate(states) if usable[i] and not s.params.greedy]
        if drawing:
            index = torch.tensor(drawing, device=scores.device)
            chosen = [states[row] for row in drawing]
            shifted = _heat(wide.take(scores, index) - wide.take(highest, index), chosen)
            candidates = Candidates(shifted, self._selection)
            for cut in self.cuts:
                if any(map(cut.asked, chosen)):
                    cut(candidates, chosen)
            drawn = candidates.weights()
            weights[index] = drawn / wide.total(drawn).float()
        return weights, usable

    def _change(
        self, logits: Tensor, states: Sequence[SampleState]
    ) -> tuple[Tensor, Tensor, Tensor, list[bool]]:
        """Scores ``[R, width]`` after all changes, their highest ``[R, 1]`` and its place ``[R]``,
        and whether each row is finite.
        """
        scores = wide.pad(logits.float())
        highest, tokens = self._selection.highest(scores)
        usable = [math.isfinite(value) for [value] in highest.tolist()]
        steps = [step for step in self.steps if any(map(step.asked, states))]
        for step in steps:
            step(scores, states)
        if steps:
            highest, tokens = self._selection.highest(scores)
            changed = highest.tolist()
            usable = [
                ok and math.isfinite(value) for ok, [value] in zip(usable, changed, strict=True)
            ]
        return scores, highest, tokens, usable

    def _draw_freely(self, scores: Tensor, states: Sequence[SampleState]) -> Tensor:
        """``[R]`` tokens for ``scores`` ``[R, width]`` whose highest is 0; they are used up."""
        return wide.locate(_heat(scores, states).exp_(), _numbers(states, scores.device))

    def _draw_cut(self, scores: Tensor, states: Sequence[SampleState]) -> Tensor:
        """The same where unlikely tokens are put out first."""
        candidates = Candidates(_heat(scores, states), self._selection)
        for cut in self.cuts:
            if any(map(cut.asked, states)):
                cut(candidates, states)
        return candidates.draw(_numbers(states, scores.device))


def _heat(scores: Tensor, states: Sequence[SampleState]) -> Tensor:
    """Divide by the rows' temperatures, in place."""
    temperatures = column(states, lambda params: params.temperature, scores.device)
    # One that fp32 cannot tell from 0 leaves 0 / 0 of the highest.
    return scores.div_(temperatures.clamp_(min=_LEAST_TEMPERATURE))


def _numbers(states: Sequence[SampleState], device: torch.device) -> Tensor:
    return torch.from_numpy(uniform_numbers(states)).to(device)


def _logprobs(logits: Tensor, rows: list[int]) -> Tensor:
    index = torch.tensor(rows, device=logits.device)
    return wide.take(logits, index).float().log_softmax(dim=-1)


def _report(logprobs: Tensor, drawn: Sequence[Drawn], states: Sequence[SampleState]) -> None:
    """Give drawn tokens their log-probabilities, rows that ask for equally many together."""
    rows_by_top: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        if drawn[row].error is None:
            rows_by_top.setdefault(state.params.logprobs or 0, []).append(row)
    for top, rows in rows_by_top.items():
        index = torch.tensor(rows, device=logprobs.device)
        tokens = [drawn[row].token for row in rows]
        found = token_logprobs(wide.take(logprobs, index), tokens, top)
        for row, value in zip(rows, found, strict=True):
            drawn[row].logprobs = value


def token_logprobs(logprobs: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Per row of ``logprobs`` ``[R, vocab]``: the token's value and rank, and the best ``top``.

    Impossible tokens are no alternatives.
    """
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    values, ids = wide.largest(wide.pad(logprobs), min(top, logprobs.shape[1]))
    return [
        TokenLogprobs(
            token,
            value,
            rank,
            tuple(one for one in zip(best, best_values, strict=True) if one[1] > -math.inf),
        )
        for token, value, rank, best, best_values in zip(
            tokens,
            chosen.squeeze(1).tolist(),
            ranks.tolist(),
            ids.tolist(),
            values.tolist(),
            strict=True,
        )
    ]
