"""The part of a step in which tokens are guessed, and the part in which they are verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headrace.contracts.outputs import TokenLogprobs
from headrace.contracts.step import PageTables, PlanRow, RowResult, StepPlan
from headrace.exec.decoding.drafter import Drafter, drafting_method
from headrace.exec.decoding.verifier import Chain, judge
from headrace.exec.forward import Forward
from headrace.exec.sampling.sampler import NOT_FINITE, Sampler, token_logprobs

Chains = Mapping[int, Chain]
"""Place of a row in the plan -> what was guessed for it, at least one token."""


class Speculation:
    """Extends rows by guesses before the forward pass, and judges them after it.

    Args:
        drafters: by name of the method.
    """

    def __init__(self, forward: Forward, sampler: Sampler, drafters: Mapping[str, Drafter]) -> None:
        self._forward = forward
        self._sampler = sampler
        self._drafters = drafters

    def _by_drafter(self, rows: Sequence[PlanRow]) -> dict[str, list[int]]:
        """The rows with room, by the method that guesses for them."""
        found: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            if row.draft_room > 0:
                found.setdefault(drafting_method(row.methods).name(), []).append(place)
        return found

    def extend(self, plan: StepPlan, tables: PageTables) -> tuple[StepPlan, Chains]:
        """The plan with guesses behind the inputs of rows, which then do not sample."""
        chains: dict[int, Chain] = {}
        rows = list(plan.rows)
        for name, places in self._by_drafter(rows).items():
            proposed = self._drafters[name].propose([rows[place] for place in places], tables)
            for place, chain in zip(places, proposed, strict=True):
                if chain.tokens:
                    chains[place] = chain
                    rows[place] = _extended(rows[place], chain)
        return replace(plan, rows=rows), chains

    def verify(
        self, plan: StepPlan, chains: Chains, hidden: Tensor, results: list[RowResult]
    ) -> None:
        """Fill in the results of rows with guesses.

        Args:
            plan: without the guesses.
            hidden: of all inputs and guesses, ``[T, hidden]``.
        """
        parts, end = [], 0
        for place, row in enumerate(plan.rows):
            length = len(chains[place].tokens) if place in chains else 0
            end += len(row.input_ids) + length
            if length:
                parts.append(hidden[end - length - 1 : end])
        logits = self._forward.logits(torch.cat(parts))
        self._judge(plan.rows, chains, logits, results)
        for name, places in self._by_drafter(plan.rows).items():
            told = [place for place in places if place in chains]
            accepted = [max(0, len(results[place].tokens) - 1) for place in told]
            self._drafters[name].observe([plan.rows[place] for place in told], accepted)

    def _judge(
        self, rows: Sequence[PlanRow], chains: Chains, logits: Tensor, results: list[RowResult]
    ) -> None:
        """``logits`` ``[T, vocab]``: at each place of each chain and after it."""
        places = sorted(chains)
        states = [state for place in places for state in rows[place].samples]
        lengths = [len(chains[place].tokens) + 1 for place in places]
        logprobs: list[Tensor | None] = [
            None if state.params.logprobs is None else torch.log_softmax(part.float(), -1)
            for state, part in zip(states, logits.split(lengths), strict=True)
        ]
        guessed = [chains[place] for place in places]
        judged = judge(self._sampler, guessed, logits, states, level=0)
        for place, state, known, (tokens, _) in zip(places, states, logprobs, judged, strict=True):
            reported: Sequence[TokenLogprobs | None] = [None] * len(tokens)
            if known is not None:
                reported = token_logprobs(known[: len(tokens)], tokens, state.params.logprobs or 0)
            drafted = len(chains[place].tokens)
            results[place] = RowResult(tokens, reported, drafted=drafted)
            if not tokens:
                results[place].error = NOT_FINITE


def _extended(row: PlanRow, chain: Chain) -> PlanRow:
    positions = range(row.positions[0], row.positions[-1] + 1 + len(chain.tokens))
    return replace(row, input_ids=[*row.input_ids, *chain.tokens], positions=positions, samples=())
