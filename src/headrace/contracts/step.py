"""A step of the engine: the plan that goes to a runner and the result that comes back.

There is no prefill or decode kind. A row feeds pending inputs at explicit positions, says what
it wants of them, and may score or sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NewType

import numpy as np
import numpy.typing as npt

from headrace.contracts.kv_codec import CodedUnit, KVCodec
from headrace.contracts.method import Method
from headrace.contracts.outputs import TokenLogprobs
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.slot_policy import SlotPolicy

Ticket = NewType("Ticket", int)

Pooling = Literal["last", "mean", "first"]
"""Which of a text's hidden states make its embedding."""


@dataclass(slots=True)
class SampleState:
    """What sampling needs to know of one sequence; the engine owns and updates it.

    Args:
        params: the request's parameters.
        prompt_token_ids: shared with the request, never changed.
        output_token_ids: the tokens generated so far; its length numbers the next draw.
        seed: 64 bits that, with the draw's number, determine every random choice.
        end_token_ids: tokens that end the sequence.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    seed: int
    end_token_ids: tuple[int, ...] = ()

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that may not be sampled now: end tokens below ``min_tokens``."""
        below = len(self.output_token_ids) < self.params.min_tokens
        return self.end_token_ids if below else ()

    def after(self, tokens: Sequence[int]) -> SampleState:
        """As it would be if these tokens had been generated too."""
        return replace(self, output_token_ids=[*self.output_token_ids, *tokens])


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a row's context that the step only reads: what was cached before it.

    Its keys are not touched: queries are turned to positions at which the distances are those of
    the order in which the reader sees its segments.

    Args:
        table_row: of its owner in the page tables. What several read is best named alike by all,
            and is then read once.
        begin: its first slot there, a multiple of the block size.
        length: slots, as many as are read.
        shift: what is added to the position of an input when it reads them.
    """

    table_row: int
    begin: int
    length: int
    shift: int


@dataclass(slots=True)
class Compaction:
    """What becomes of a row's slots when its inputs have been fed.

    Args:
        policy: decides which stay.
        slots: how many stay in every layer and head, in their order.
        pages: where they go, int32 ``[groups, pages]``; nobody else holds these.
    """

    policy: SlotPolicy
    slots: int
    pages: npt.NDArray[np.int32]


@dataclass(slots=True)
class CodedContext:
    """The units before a row's own slots, and those that its slots become, in each cache group.

    Args:
        units: how they lie in pages.
        pages: of the units in order, int32 ``[n, unit.pages]``.
        fills: int32 ``[m, unit.pages]``: where the first ``m`` units of the row's own slots are
            coded when the step ends; nobody else holds these.
    """

    codec: KVCodec
    units: Sequence[CodedUnit]
    pages: Sequence[npt.NDArray[np.int32]]
    fills: Sequence[npt.NDArray[np.int32]]


@dataclass(slots=True)
class PlanRow:
    """What one sequence feeds in this step.

    Args:
        sequence: the sequence's number.
        table_row: its row in the page tables.
        input_ids: token ids to feed, in order.
        positions: one position per input (RoPE), ascending; slots may differ from positions later.
        slot: the first KV slot that is written; inputs take consecutive slots.
        slots: the same for each cache group, where they differ.
        samples: one entry per token to draw from the last input's logits; several when the
            sequence forks here; empty when the inputs end before the known tokens do.
        score_ids: tokens whose log-probability is wanted, the i-th given inputs ``[0..i]``.
        score_top: alternatives to report for each scored token.
        pooling: what is wanted of the hidden states of the inputs.
        adapter: key of the adapter that the inputs go through; "": none.
        methods: of the request, as it chose them.
        first: nothing has been fed since the sequence got its table row.
        observer: watches the attention of the inputs, if any does.
        compaction: what becomes of the slots after the step.
        coded: what is before the slots, if it is coded.
        num_quiet: so many of the inputs come before the first one that a token is drawn from.
        begin: the slot at which the row's own context begins, a multiple of the block size. What
            lies before it is not read but through segments.
        segments: what the inputs see beside the row's own context.
        num_prompt: so many of the inputs are of the prompt, the others were generated.
        draft_room: so many slots behind those of the inputs are there for tokens that one of the
            methods may guess; the row then has one sample.
    """

    sequence: int
    table_row: int
    input_ids: Sequence[int]
    positions: Sequence[int]
    slot: int
    samples: Sequence[SampleState] = ()
    score_ids: Sequence[int] = ()
    score_top: int = 0
    pooling: Pooling | None = None
    adapter: str = ""
    methods: tuple[Method, ...] = ()
    num_quiet: int = 0
    first: bool = False
    observer: SlotPolicy | None = None
    compaction: Compaction | None = None
    coded: CodedContext | None = None
    begin: int = 0
    segments: Sequence[Segment] = ()
    num_prompt: int = 0
    draft_room: int = 0
    slots: Sequence[int] | None = None

    def slot_in(self, group: int) -> int:
        """The first slot that is written in a cache group."""
        return self.slot if self.slots is None else self.slots[group]

    @property
    def ends_prompt(self) -> bool:
        """Whether the prompt's last token is among the inputs: the first that is drawn from."""
        return self.num_prompt > self.num_quiet


@dataclass(slots=True)
class StepPlan:
    """One step: rows, and the page work that must precede them.

    Args:
        copies: (source, target) pages, for copy-on-write; they come first, and no target is also
            a source.
        blank: pages to zero: they will be partly filled, and stale bytes (another request's
            NaN) must not leak into padded reads.
        state_copies: (source, target) table rows, for sequences that parted: what a model keeps
            for a whole sequence is copied, in this order. The ``first`` row of a sequence begins
            with a state of zeros.
    """

    rows: list[PlanRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)
    state_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        """Tokens fed by all rows."""
        return sum(len(row.input_ids) for row in self.rows)


@dataclass(slots=True)
class RowResult:
    """What one plan row produced. ``tokens[i]`` answers ``samples[i]``.

    Where tokens were ``drafted``, so many, there is one sample, and ``tokens`` follow each other:
    all but the last were guessed right, and are in the slots behind those of the inputs.

    ``pooled`` ``[hidden]`` is the hidden state of the last or first input, or, for the mean, the
    sum over all. ``error`` says that this row alone failed; the rest is then meaningless.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs | None] = ()
    scores: Sequence[TokenLogprobs] = ()
    pooled: npt.NDArray[np.float32] | None = None
    error: str | None = None
    drafted: int = 0


@dataclass(slots=True)
class StepResult:
    """Results in the order of the plan's rows, and where the time went (seconds)."""

    rows: list[RowResult]
    timings: dict[str, float] = field(default_factory=dict)


PageTables = npt.NDArray[np.int32]
"""``[groups, rows, pages]``: persistent, updated in place by the engine, read by the runner."""


class Runner(ABC):
    """Executes step plans."""

    @abstractmethod
    def submit(self, plan: StepPlan, tables: PageTables) -> Ticket:
        """Begin a step. The plan and the tables' rows in it stay unchanged until collected.

        Like ``collect``, it may raise what the execution raised.
        """

    @abstractmethod
    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a step's result. Raises whatever the execution raised."""

    def close(self) -> None:
        """Give back threads and memory."""
        return None
