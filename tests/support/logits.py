"""What an LLM computed: the logits of every sampled position, and the rows of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.contracts.outputs import RequestOutput
from headrace.contracts.step import (
    PageTables,
    Runner,
    SampleState,
    StepPlan,
    StepResult,
    Ticket,
)


@dataclass(frozen=True)
class StepRow:
    """A row as it was planned: how many inputs, after how many slots, and whether it sampled."""

    inputs: int
    past: int
    samples: int

    @property
    def is_decode(self) -> bool:
        return self.inputs == 1 and self.past > 0

    @property
    def is_chunk(self) -> bool:
        """Whether it is a part of a prompt that is not its beginning."""
        return self.inputs > 1 and self.past > 0


class _RecordingSampler:
    def __init__(self, sampler: Any, recorder: LogitsRecorder) -> None:
        self._sampler = sampler
        self._recorder = recorder

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> Any:
        for row, state in zip(logits, states, strict=True):
            self._recorder.note(state, row.float().cpu().clone())
        return self._sampler.sample(logits, states)


class _RecordingRunner(Runner):
    def __init__(self, runner: Runner, steps: list[list[StepRow]]) -> None:
        self._runner = runner
        self._steps = steps

    def submit(self, plan: StepPlan, tables: PageTables) -> Ticket:
        rows = [StepRow(len(row.input_ids), row.slot, len(row.samples)) for row in plan.rows]
        self._steps.append(rows)
        return self._runner.submit(plan, tables)

    def collect(self, ticket: Ticket) -> StepResult:
        return self._runner.collect(ticket)

    def close(self) -> None:
        self._runner.close()


class LogitsRecorder:
    """Listens to an ``LLM`` or ``AsyncLLM`` from now on.

    Attributes:
        steps: the rows of every step.
    """

    def __init__(self, llm: Any) -> None:
        self.steps: list[list[StepRow]] = []
        self._sequences: dict[int, tuple[SampleState, list[Tensor]]] = {}
        runner = llm.engine.runner
        runner.sampler = _RecordingSampler(runner.sampler, self)
        llm.engine.runner = _RecordingRunner(runner, self.steps)

    def note(self, state: SampleState, logits: Tensor) -> None:
        """Take the logits ``[vocab]`` from which the next token of a sequence is drawn."""
        self._sequences.setdefault(id(state), (state, []))[1].append(logits)

    def logits(self, output: RequestOutput, index: int = 0) -> Tensor:
        """``[tokens, vocab]``: from what each token of a completion was drawn, in fp32.

        Where several sequences had this prompt and these tokens, those of the last.
        """
        prompt, tokens = output.prompt_token_ids, output.outputs[index].token_ids
        for state, rows in reversed(self._sequences.values()):
            if state.prompt_token_ids == prompt and state.output_token_ids[: len(tokens)] == tokens:
                # Of a request that was cut off, a token more may have been drawn.
                return torch.stack(rows[: len(tokens)])
        raise AssertionError(f"no sequence with prompt {prompt} sampled {tokens}")
