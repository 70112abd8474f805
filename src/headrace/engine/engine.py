"""The engine: requests in, steps, updates out. It knows no tensor and no tokenizer."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from headrace.contracts.clock import Clock
from headrace.contracts.gang import GangMethod, gang_method
from headrace.contracts.kv_codec import CodedUnit, KVCodec, coded_units
from headrace.contracts.method import of_kind
from headrace.contracts.outputs import FinishReason, SequenceUpdate, TokenLogprobs
from headrace.contracts.profile import EXACT, Profile
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.stats import EngineStats
from headrace.contracts.step import (
    PlanRow,
    Pooling,
    RowResult,
    Runner,
    SampleState,
    StepPlan,
    StepResult,
)
from headrace.contracts.text import TextStreamFactory
from headrace.contracts.token_pruning import TokenPruningMethod
from headrace.engine.gang import Gang, most_gang_tokens
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Request, Sequence, Status
from headrace.errors import InvalidRequestError, OverloadedError

_log = logging.getLogger(__name__)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_NOTHING = RowResult()


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What requests are checked against.

    Args:
        max_model_len: prompt and output tokens of one sequence at most.
        max_num_waiting: requests in the queue at most.
        vocab_size: token ids are below it.
        eos_token_ids: tokens that end a sequence unless ``ignore_eos``.
        generates: whether the model predicts tokens; else it makes embeddings alone.
    """

    max_model_len: int
    max_num_waiting: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    generates: bool = True


class Engine:
    """Continuous batching over a runner. Not thread-safe: one thread owns it.

    Args:
        scheduler: plans steps and holds the page accounting.
        runner: executes them.
        clock: real or virtual time.
        limits: what requests are checked against.
        text: makes the detokenizer of a sequence; ``None`` for token ids only.
        seed: base for requests that name no seed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        limits: EngineLimits,
        text: TextStreamFactory | None = None,
        seed: int | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self.limits = limits
        self.timings: dict[str, float] = {}
        self._text = text
        self._random = random.Random(seed)
        self._requests: dict[str, Request] = {}
        self._sequences: dict[int, Sequence] = {}
        self._next_number = 0
        self._ready: list[SequenceUpdate] = []
        self._stats = EngineStats(pages_total=scheduler.accounting.pool.num_pages)
        self._counts = dict.fromkeys(
            (
                "prompt_tokens",
                "generation_tokens",
                "steps",
                "aborted",
                "failed",
                "drafts",
                "draft_tokens",
                "accepted_tokens",
            ),
            0,
        )

    # -- requests ---------------------------------------------------------------------------

    def check_request(
        self,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        pooling: Pooling | None = None,
        profile: Profile = EXACT,
        beginnings: SequenceOf[SequenceOf[int]] = (),
    ) -> int:
        """The number of tokens each sequence of the request may generate.

        Raises:
            InvalidRequestError: the prompt is empty or too long, ``max_tokens`` does not fit
                behind it, a token id is beyond the vocabulary, the model does not generate,
                something is wanted of tokens that a method drops, or the sequences are a gang for
                which there will never be room.
        """
        if pooling is None and not self.limits.generates:
            raise InvalidRequestError(
                "model", "makes embeddings and generates nothing; ask for embeddings"
            )
        length, context = len(prompt_token_ids), self.limits.max_model_len
        if length == 0:
            raise InvalidRequestError("prompt", "is empty; give at least one token")
        vocab = self.limits.vocab_size
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab:
            raise InvalidRequestError("prompt", f"token ids must be in [0, {vocab})")
        for field, ids in (
            ("stop_token_ids", params.stop_ids),
            ("logit_bias", tuple(params.logit_bias or ())),
        ):
            if any(not 0 <= token < vocab for token in ids):
                raise InvalidRequestError(field, f"token ids must be in [0, {vocab})")
        room = context - length
        if room < 0 or (room == 0 and params.max_tokens != 0):
            raise InvalidRequestError(
                "prompt", f"has {length} tokens; the context holds {context}, output included"
            )
        self._check_pruning(length, params, pooling, profile)
        if gang_method(profile.methods, params.n) is not None and params.max_tokens != 0:
            return self._check_gang(length, params, beginnings)
        if params.max_tokens is None:
            return room
        if params.max_tokens > room:
            raise InvalidRequestError(
                "max_tokens",
                f"{params.max_tokens} tokens do not fit: the context holds {context} and the "
                f"prompt takes {length}; ask for at most {room}",
            )
        return params.max_tokens

    def _check_pruning(
        self, length: int, params: SamplingParams, pooling: Pooling | None, profile: Profile
    ) -> None:
        """Some tokens of the prompt may not come out of the last layer."""
        if params.prompt_logprobs is None and pooling not in ("mean", "first"):
            return
        stages = self.scheduler.accounting.layout.num_stages
        for method in of_kind(profile.methods, TokenPruningMethod):
            if not method.drops(stages, length):
                continue
            drops = f"{method.name()} drops tokens of the prompt; leave it out for this request"
            if params.prompt_logprobs is not None:
                raise InvalidRequestError("prompt_logprobs", drops)
            raise InvalidRequestError(
                "methods", f"the embedding is made of all tokens, and {drops}"
            )

    def _check_gang(
        self, prompt: int, params: SamplingParams, beginnings: SequenceOf[SequenceOf[int]]
    ) -> int:
        """``check_request`` of sequences that run together."""
        limit, accounting = self.scheduler.limit, self.scheduler.accounting
        for room, option in (
            (limit.rows, "max_num_seqs"),
            (limit.tokens, "max_num_batched_tokens"),
        ):
            if params.n > room:
                raise InvalidRequestError(
                    "n",
                    f"{params.n} sequences that see each other advance together, and a step has "
                    f"room for {room}; ask for fewer, or raise {option}",
                )
        headers = [len(each) for each in beginnings] or [0] * params.n
        context, pages = self.limits.max_model_len, accounting.pool.num_pages
        columns = accounting.tables.shape[2]
        most = most_gang_tokens(prompt, headers, context, accounting.layout, pages, columns)
        if most < (params.max_tokens or 1):
            raise InvalidRequestError(
                "max_tokens",
                f"{params.n} sequences that see each other have room for {most} tokens each behind "
                f"a prompt of {prompt} and headers of {sum(headers)}: the context holds {context}, "
                f"the KV cache {pages} pages; ask for less, or for fewer sequences",
            )
        return params.max_tokens or most

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        profile: Profile = EXACT,
        boundaries: tuple[int, ...] = (),
        pooling: Pooling | None = None,
        beginnings: SequenceOf[SequenceOf[int]] = (),
    ) -> None:
        """Queue a request; its updates come from later steps.

        Args:
            boundaries: counts of prompt tokens; what lies before one is fed, and sealed as far as
                pages are full, before anything behind it.
            pooling: an embedding is wanted, and ``max_tokens`` is 0.
            beginnings: of a gang, tokens that each sequence's block begins with; they are no part
                of its output.

        Raises:
            InvalidRequestError: see ``check_request``; or the id is in use.
            OverloadedError: the queue is full.
        """
        if request_id in self._requests:
            raise InvalidRequestError("request_id", f"{request_id!r} is already running")
        if not isinstance(priority, int):
            raise InvalidRequestError("priority", f"must be an integer, got {priority!r}")
        max_tokens = self.check_request(prompt_token_ids, params, pooling, profile, beginnings)
        if self.queue_is_full:
            raise OverloadedError(
                f"{len(self.scheduler.waiting)} requests are waiting already; try again later"
            )
        request = Request(
            request_id,
            prompt_token_ids,
            params,
            max_tokens,
            priority,
            profile,
            self.clock.now(),
            boundaries,
            pooling,
            self.scheduler.accounting.layout.block_size,
            self._units(profile),
        )
        self._check_pages(request)
        seed = params.seed if params.seed is not None else self._random.getrandbits(64)
        ends = params.stop_ids + (() if params.ignore_eos else self.limits.eos_token_ids)
        for index in range(params.n):
            state = SampleState(
                params, prompt_token_ids, [], (seed + index * _GOLDEN) & _MASK, ends
            )
            text = self._text(params) if self._text else None
            sequence = Sequence(self._next_number, request, index, state, text)
            self._next_number += 1
            request.sequences.append(sequence)
            self._sequences[sequence.number] = sequence
        method = gang_method(profile.methods, params.n)
        if method is not None and max_tokens > 0:
            self._make_gang(request, method, beginnings)
        self._requests[request_id] = request
        self._counts["prompt_tokens"] += len(prompt_token_ids)
        if max_tokens == 0 and not request.num_unscored and pooling is None:
            for sequence in list(request.sequences):
                self._finish(sequence, self._update(sequence, []), "length")
        else:
            self.scheduler.enqueue(request.sequences[0])

    def _check_pages(self, request: Request) -> None:
        """Raise InvalidRequestError if reducing or coding slots needs more pages than there are."""
        accounting = self.scheduler.accounting
        tokens = len(request.prompt_token_ids) + request.max_tokens
        if request.stages is not None and not request.units:
            return  # It has no more than any other of this length.
        most = accounting.pages_at_once(request, tokens)
        # One more for each group: of sequences that parted, the last page is copied.
        needed = 0 if most is None else most + len(accounting.layout.groups)
        if needed > accounting.pool.num_pages:
            raise InvalidRequestError(
                "methods",
                f"reducing or coding slots takes up to {needed} pages at once, and there are "
                f"{accounting.pool.num_pages}; lower the budget or raise kv_cache_memory_bytes",
            )

    def _units(self, profile: Profile) -> tuple[CodedUnit, ...]:
        """How the KV of a request is coded, if it is."""
        layout = self.scheduler.accounting.layout
        for codec in of_kind(profile.methods, KVCodec):
            return coded_units(codec, layout)
        return ()

    @staticmethod
    def _make_gang(
        request: Request, method: GangMethod, beginnings: SequenceOf[SequenceOf[int]]
    ) -> None:
        request.gang = Gang(request.sequences, method)
        # The leader feeds no more than the prompt before they part.
        prompt = len(request.prompt_token_ids)
        request.boundaries = (*(end for end in request.boundaries if end < prompt), prompt)
        for sequence, tokens in zip(request.sequences, beginnings, strict=False):
            sequence.token_ids += tokens

    @property
    def queue_is_full(self) -> bool:
        """Whether ``add_request`` would refuse for want of room in the queue."""
        return len(self.scheduler.waiting) >= self.limits.max_num_waiting

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a step could still produce updates."""
        return bool(self._requests or self._ready)

    def abort_request(self, request_id: str) -> bool:
        """End a request now; its pages are free when this returns. False when it is unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._counts["aborted"] += 1
        self._end_request(request, "abort", None)
        return True

    # -- steps ------------------------------------------------------------------------------

    def step(self) -> list[SequenceUpdate]:
        """Plan and execute one step; return what it added to sequences."""
        started = self.clock.now()
        plan = self.scheduler.plan(started)
        planned = self.clock.now()
        if plan.rows:
            try:
                ticket = self.runner.submit(plan, self.scheduler.accounting.tables)
                result = self.runner.collect(ticket)
            except Exception as error:
                _log.exception("a step of %d rows failed", len(plan.rows))
                self._fail_rows(plan, f"{type(error).__name__}: {error}")
            else:
                self._commit_timed(plan, result, started, planned)
        updates, self._ready = self._ready, []
        return updates

    def _commit_timed(
        self, plan: StepPlan, result: StepResult, started: float, planned: float
    ) -> None:
        executed = self.clock.now()
        self._counts["steps"] += 1
        all_single = plan.num_inputs == len(plan.rows)
        sealing = []
        for row, outcome in zip(plan.rows, result.rows, strict=True):
            sequence = self._sequences.get(row.sequence)
            if sequence is None:
                continue
            if outcome.error is not None:
                self._counts["failed"] += 1
                self._end_request(sequence.request, "error", outcome.error)
                continue
            sealed = sequence.num_sealed
            self._commit_inputs(sequence, len(row.input_ids), outcome)
            if sequence.num_sealed > sealed:
                sealing.append(sequence)
        self.scheduler.accounting.shrink(sealing)
        for row, outcome in zip(plan.rows, result.rows, strict=True):
            sequence = self._sequences.get(row.sequence)
            if sequence is not None:
                self._commit_outputs(sequence, row, outcome)
                if row.draft_room and sequence.status is Status.RUNNING:
                    self.scheduler.accounting.trim(sequence)
                if sequence.draft_gain is not None and all_single:
                    drafted = outcome.drafted > 0
                    sequence.draft_gain.note(len(outcome.tokens), executed - started, drafted)
        self.timings = {
            **result.timings,
            "plan": planned - started,
            "commit": self.clock.now() - executed,
        }

    def _commit_inputs(self, sequence: Sequence, count: int, outcome: RowResult) -> None:
        """Advance one sequence by what its row fed."""
        request = sequence.request
        if outcome.scores:
            scored = request.prompt_logprobs
            assert scored is not None
            scored.extend(outcome.scores[len(scored) - sequence.num_fed - 1 :])
        if outcome.pooled is not None:
            request.pool(outcome.pooled)
        sequence.num_fed += count
        sequence.num_slots += count
        sequence.next_position += count
        self.scheduler.accounting.seal(sequence)
        if request.gang is not None and request.gang.can_part:
            self.scheduler.accounting.part(request.gang)

    def _commit_outputs(self, sequence: Sequence, row: PlanRow, outcome: RowResult) -> None:
        """Advance one sequence by what its row produced."""
        request = sequence.request
        if outcome.drafted:
            self._commit_draft(sequence, outcome)
        elif outcome.tokens:
            parting = len(row.samples) > 1
            takers = list(request.sequences) if parting else [sequence]
            if parting and request.gang is None:
                self._fork(sequence, takers[1:])
            for taker, token, logprobs in zip(
                takers, outcome.tokens, outcome.logprobs, strict=True
            ):
                self._append_token(taker, token, logprobs)
        elif request.max_tokens == 0 and sequence.num_pending == 0:
            for each in list(request.sequences):
                self._finish(each, self._update(each, []), "length")

    def _commit_draft(self, sequence: Sequence, outcome: RowResult) -> None:
        """Add tokens that were guessed right, each as if it had been fed, and the one after."""
        metrics, accepted = sequence.request.metrics, len(outcome.tokens) - 1
        metrics.num_draft_tokens += outcome.drafted
        metrics.num_accepted_tokens += accepted
        self._counts["drafts"] += 1
        self._counts["draft_tokens"] += outcome.drafted
        self._counts["accepted_tokens"] += accepted
        for index, (token, logprobs) in enumerate(
            zip(outcome.tokens, outcome.logprobs, strict=True)
        ):
            if index > 0:
                self._commit_inputs(sequence, 1, _NOTHING)
            self._append_token(sequence, token, logprobs)
            if sequence.status is Status.FINISHED:
                return

    def _fork(self, parent: Sequence, children: list[Sequence]) -> None:
        """Start the siblings on the parent's pages; without a free row they wait instead."""
        for child in children:
            if self.scheduler.accounting.num_free_rows:
                self.scheduler.accounting.fork(parent, child)
                self.scheduler.start(child)
            else:
                self.scheduler.enqueue(child)

    def _append_token(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        request, state = sequence.request, sequence.state
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = self.clock.now()
        sequence.token_ids.append(token)
        state.output_token_ids.append(token)
        self._counts["generation_tokens"] += 1
        update = self._update(sequence, [token])
        if sequence.index == 0 and len(state.output_token_ids) == 1:
            update.prompt_logprobs = request.prompt_logprobs
        if logprobs is not None:
            update.logprobs = [logprobs]
        ends = token in state.end_token_ids
        if sequence.text is not None and (not ends or state.params.include_stop_str_in_output):
            update.text = sequence.text.push(token)
            if sequence.text.stopped_by is not None:
                update.stop_reason = sequence.text.stopped_by
                self._finish(sequence, update, "stop")
                return
        if ends:
            update.stop_reason = token if token in state.params.stop_ids else None
            self._finish(sequence, update, "stop")
        elif len(state.output_token_ids) >= request.max_tokens:
            self._finish(sequence, update, "length")
        else:
            self._ready.append(update)

    def _update(self, sequence: Sequence, token_ids: list[int]) -> SequenceUpdate:
        return SequenceUpdate(sequence.request.request_id, sequence.index, token_ids)

    # -- endings ----------------------------------------------------------------------------

    def _finish(
        self,
        sequence: Sequence,
        update: SequenceUpdate,
        reason: FinishReason,
        error: str | None = None,
    ) -> None:
        """End a sequence with its last update; the request ends with its last sequence."""
        request = sequence.request
        if sequence.text is not None and sequence.text.stopped_by is None:
            update.text += sequence.text.finish()
        update.finish_reason = reason
        update.error = error
        update.embedding = request.embedding if reason == "length" else None
        self.scheduler.remove(sequence)
        request.unfinished -= 1
        if request.gang is None:
            del self._sequences[sequence.number]
        elif request.unfinished == 0:
            for member in request.gang.members:
                del self._sequences[member.number]
        if request.unfinished == 0:
            request.metrics.finished_time = self.clock.now()
            update.request_finished = True
            update.metrics = request.metrics
            if request.max_tokens == 0:
                update.prompt_logprobs = request.prompt_logprobs
            del self._requests[request.request_id]
        self._ready.append(update)

    def _end_request(self, request: Request, reason: FinishReason, error: str | None) -> None:
        for sequence in request.sequences:
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, self._update(sequence, []), reason, error)

    def _fail_rows(self, plan: StepPlan, message: str) -> None:
        """The whole step failed: end every request that took part, keep the others."""
        self.scheduler.accounting.return_state_copies(plan.state_copies)
        for row in plan.rows:
            sequence = self._sequences.get(row.sequence)
            if sequence is not None:
                self._counts["failed"] += 1
                self._end_request(sequence.request, "error", message)

    # -- observation ------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """A snapshot of gauges and counters."""
        scheduler, accounting = self.scheduler, self.scheduler.accounting
        return replace(
            self._stats,
            waiting=len(scheduler.waiting),
            running=len(scheduler.holders),
            pages_used=accounting.pool.num_pages - accounting.num_available,
            pages_cached=accounting.num_cached,
            pages_peak=scheduler.pages_peak,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.num_preemptions,
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Prove the invariants of requests, scheduler and pages. Raises AssertionError."""
        running = self.scheduler.holders
        self.scheduler.accounting.check_integrity(running)
        waiting = [each for first in self.scheduler.waiting for each in first.together]
        scheduled = {s.number for s in (*running, *waiting)}
        for sequence in self._sequences.values():
            queued = sequence.status is not Status.NEW
            if queued != (sequence.number in scheduled):
                raise AssertionError(f"sequence {sequence.number} is lost")
            ended = sequence.status is Status.FINISHED
            if sequence.num_pending < 1 and sequence.request.max_tokens > 0 and not ended:
                raise AssertionError(f"sequence {sequence.number} has nothing to feed")
        if scheduled - self._sequences.keys():
            raise AssertionError("a finished sequence is still scheduled")
