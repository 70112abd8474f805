"""The in-process runner: one model, one arena, one device."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.contracts.outputs import TokenLogprobs
from headrace.contracts.step import (
    PageTables,
    RowResult,
    Runner,
    StepPlan,
    StepResult,
    Ticket,
)
from headrace.exec.coded_past import fill_unit
from headrace.exec.decoding.drafter import Drafter
from headrace.exec.decoding.speculation import Speculation
from headrace.exec.forward import Forward
from headrace.exec.route import Route
from headrace.exec.sampling.sampler import Sampler, token_logprobs

_SCORED_AT_ONCE = 64
"""Rows of prompt logits in memory at once, since a row is as wide as the vocabulary."""


class LocalRunner(Runner):
    """Executes a plan when it is submitted; ``collect`` hands out the result.

    Args:
        drafters: what guesses tokens, by name of the method.

    Attributes:
        tiers: what brings what is on disk; closed with the runner.
    """

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        drafters: Mapping[str, Drafter] | None = None,
    ) -> None:
        self.tiers = forward.extensions.placed.tiers
        self.arena = forward.arena
        self.sampler = sampler
        self._forward = forward
        self._ops = forward.ops
        self._statistics = forward.extensions.statistics
        self._speculation = Speculation(forward, sampler, drafters or {})
        self._results: dict[Ticket, StepResult] = {}
        self._tickets = 0

    def submit(self, plan: StepPlan, tables: PageTables) -> Ticket:
        self._tickets += 1
        ticket = Ticket(self._tickets)
        with torch.inference_mode():
            self._results[ticket] = self._execute(plan, tables)
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        return self._results.pop(ticket)

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    def _execute(self, plan: StepPlan, tables: PageTables) -> StepResult:
        marks = [time.perf_counter()]
        self.arena.copy_pages(plan.copies)
        self.arena.blank_pages(plan.blank)
        self.arena.copy_states(plan.state_copies)
        self.arena.clear_states([row.table_row for row in plan.rows if row.first])
        if self._statistics is not None:
            self._statistics.copy(plan.state_copies)
            self._statistics.clear([row.table_row for row in plan.rows if row.first])
        planned, chains = plan, None
        if any(row.draft_room for row in plan.rows):
            plan, chains = self._speculation.extend(plan, tables)
            marks.append(time.perf_counter())
        batches = self._forward.builder.build(plan.rows, tables)
        marks.append(time.perf_counter())
        route = self._forward.route(plan.rows, tables)
        if route is None:
            hidden = self._forward.loop.run(batches)
        else:
            hidden = self._forward.loop.run_routed(
                batches, route, lambda rows, first: self._forward.builder.build(rows, tables, first)
            )
        results = [RowResult() for _ in plan.rows]
        self._reduce(plan, tables)
        logits = self._last_logits(plan, hidden, route)
        marks.append(time.perf_counter())
        if logits is not None:
            self._sample(plan, logits, results)
        self._score(plan, hidden, results)
        self._pool(plan, hidden, results)
        if chains:
            self._speculation.verify(planned, chains, hidden, results)
        marks.append(time.perf_counter())
        drafting = () if chains is None else ("draft",)
        names = (*drafting, "batch", "forward", "sample")
        spans = zip(names, marks, marks[1:], strict=False)
        return StepResult(results, {name: end - start for name, start, end in spans})

    def _reduce(self, plan: StepPlan, tables: PageTables) -> None:
        """Reduce or code the slots of the rows for which that is due."""
        for row in plan.rows:
            if row.compaction is not None:
                assert self._statistics is not None
                self._statistics.compact(row, row.compaction, tables)
            if row.coded is not None:
                fill_unit(self.arena, row, row.coded, tables)

    def _last_logits(self, plan: StepPlan, hidden: Tensor, route: Route | None) -> Tensor | None:
        """Logits after the last input of every row that samples; some rows bring theirs."""
        brought = {} if route is None else route.logits
        ends, place = [], 0
        for number, row in enumerate(plan.rows):
            place += len(row.input_ids)
            if row.samples and number not in brought:
                ends.append(place - 1)
        computed = None
        if ends:
            if len(ends) < len(hidden):
                hidden = hidden[torch.tensor(ends, device=hidden.device)]
            computed = self._forward.loop.logits(hidden)
        if route is None or not brought:
            return computed
        sampling = [number for number, row in enumerate(plan.rows) if row.samples]
        return route.join_logits(sampling, computed)

    def _sample(self, plan: StepPlan, logits: Tensor, results: list[RowResult]) -> None:
        """Draw for all rows; a row with several samples repeats its logits."""
        owners = [index for index, row in enumerate(plan.rows) for _ in row.samples]
        states = [state for row in plan.rows for state in row.samples]
        if len(states) > len(logits):
            counts = torch.tensor([len(row.samples) for row in plan.rows if row.samples])
            logits = logits.repeat_interleave(counts.to(logits.device), dim=0)
        if self._ops.batch_invariant:
            drawn = [
                self.sampler.sample(row, [state])[0]
                for row, state in zip(logits.split(1), states, strict=True)
            ]
        else:
            drawn = self.sampler.sample(logits, states)
        for index, draw in zip(owners, drawn, strict=True):
            result = results[index]
            result.tokens = (*result.tokens, draw.token)
            result.logprobs = (*result.logprobs, draw.logprobs)
            result.error = result.error or draw.error

    def _pool(self, plan: StepPlan, hidden: Tensor, results: list[RowResult]) -> None:
        """Hidden states for the rows that want an embedding."""
        place = 0
        for row, result in zip(plan.rows, results, strict=True):
            count = len(row.input_ids)
            if row.pooling is not None:
                pooled = self._forward.loop.pool(hidden[place : place + count], row.pooling).float()
                if not bool(torch.isfinite(pooled).all()):
                    result.error = "the embedding is not finite (NaN or infinity)"
                result.pooled = pooled.cpu().numpy()
            place += count

    def _score(self, plan: StepPlan, hidden: Tensor, results: list[RowResult]) -> None:
        """Log-probabilities of known tokens, for the rows that ask."""
        place = 0
        for row, result in zip(plan.rows, results, strict=True):
            scores: list[TokenLogprobs] = []
            for start in range(0, len(row.score_ids), _SCORED_AT_ONCE):
                tokens = row.score_ids[start : start + _SCORED_AT_ONCE]
                inputs = hidden[place + start : place + start + len(tokens)]
                logits = self._forward.loop.logits(inputs).float()
                if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
                    result.error = "the logits of the prompt are not finite (NaN or infinity)"
                    break
                scores += token_logprobs(torch.log_softmax(logits, -1), tokens, row.score_top)
            result.scores = scores
            place += len(row.input_ids)
