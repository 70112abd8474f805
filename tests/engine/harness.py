"""Drives an engine, the one that ``LLM`` composes, and knows what must come of every request."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheGroup, CacheLayout, PlaneSpec
from headrace.contracts.gang import GangMethod, gang_method
from headrace.contracts.kv_codec import KVCodec
from headrace.contracts.kv_policy import KVPolicy
from headrace.contracts.method import Method, MethodCard, Property, conflict
from headrace.contracts.outputs import SequenceUpdate, TokenLogprobs
from headrace.contracts.profile import EXACT, Profile
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.slot_policy import SlotPolicy
from headrace.contracts.step import Pooling
from headrace.engine.sequence import Request
from headrace.errors import InvalidRequestError, OverloadedError
from headrace.plan.simulation import simulated_engine
from tests.engine.checking_runner import (
    CheckingRunner,
    Fault,
    Guessing,
    Vector,
    draw,
    histories,
    pool,
    score,
)
from tests.engine.gang_checks import block_histories, fits
from tests.engine.hashed_tokens import HashedTokens

VOCAB = 11
EOS = 0


Windows = tuple[int | None, ...]
"""The window of each cache group."""


@dataclass(frozen=True, slots=True)
class Watching(Method):
    """Sees every input, keeps a state of the sequence, and ends a chunk where the prompt ends."""

    card: ClassVar[MethodCard] = MethodCard(
        "", "", "exact", requires=frozenset({Property.FED_TOKENS_STAY})
    )
    needs_all_inputs: ClassVar[bool] = True

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        return prompt_tokens

    def boundaries(self, prompt_tokens: int) -> tuple[int, ...]:
        return (prompt_tokens,)


def make_layout(
    windows: Windows,
    block_size: int,
    states: bool = False,
    method_states: bool = False,
    staged: bool = False,
) -> CacheLayout:
    """Cache groups of one layer each, and a state of the model or of methods if wanted.

    ``staged``: each is a stage; of three or more, the first two are one.
    """
    planes = tuple(PlaneSpec(name, "slot", 1, 2, "float32") for name in ("key", "value"))
    together = len(windows) > 2
    groups = [
        CacheGroup((i,), (planes,), window, staged * max(0, i - together))
        for i, window in enumerate(windows)
    ]
    state = (len(groups), PlaneSpec("state", "sequence", 1, 2, "float32"))
    kept = [(state,) if wanted else () for wanted in (states, method_states)]
    return CacheLayout(block_size, tuple(groups), *kept)


@dataclass
class Setup:
    """A small engine: everything about it is scarce."""

    policy: str = "fcfs"
    prefix_caching: bool = True
    windows: Windows = (None,)
    """Of each cache group."""
    states: bool = False
    method_states: bool = False
    block_size: int = 2
    pages: int = 12
    """Per group."""
    context: int = 20
    rows: int = 4
    tokens: int = 8
    waiting: int = 6
    policies: tuple[KVPolicy | SlotPolicy | KVCodec, ...] = ()
    """What decides what stays in the cache, of which a request may have one."""
    gangs: tuple[GangMethod, ...] = ()
    """Methods by which sequences of a request may see each other."""
    pruning: tuple[HashedTokens, ...] = ()
    """What drops tokens of prompts, of which a request may have one."""
    drafting: bool = False
    """Whether requests may have their tokens guessed."""
    causal: bool = True
    """Whether it generates; else a step has room for any prompt."""

    def __post_init__(self) -> None:
        if not self.causal:
            self.tokens = max(self.tokens, self.context)


@dataclass
class Record:
    """What is known of one request: what it asked for, and what has come back."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    limit: int
    profile: Profile
    request: Request | None
    pooling: Pooling | None = None
    beginnings: SequenceOf[SequenceOf[int]] = ()
    tokens: list[list[int]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return self.params.stop_ids + (() if self.params.ignore_eos else (EOS,))

    @property
    def longest(self) -> int:
        """Inputs that all sequences together may feed, when nothing is preempted."""
        begun = sum(map(len, self.beginnings))
        return self.params.n * (len(self.prompt) + self.limit) + begun


def embedding(record: Record) -> Vector | None:
    """Of the prompt, if it was asked for."""
    if record.pooling is None:
        return None
    pooled = pool(histories(record.profile, record.prompt), record.pooling)
    return pooled / np.float32(len(record.prompt)) if record.pooling == "mean" else pooled


class Harness:
    """One engine with a ``CheckingRunner``, and a record of every request.

    Each method checks what it can: updates against the records, counters, integrity.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = EngineConfig(
            scheduling_policy=setup.policy,
            enable_prefix_caching=None if setup.prefix_caching else False,
            block_size=setup.block_size,
            max_num_seqs=setup.rows,
            max_num_batched_tokens=setup.tokens,
            max_num_waiting=setup.waiting,
            seed=0,
        )
        self.engine, self.clock = simulated_engine(
            config,
            layout=make_layout(
                setup.windows,
                setup.block_size,
                setup.states,
                setup.method_states,
                bool(setup.pruning),
            ),
            num_pages=setup.pages * len(setup.windows),
            context=setup.context,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            causal=setup.causal,
        )
        inner = self.engine.runner
        self.runner = CheckingRunner(inner, self.engine, VOCAB, setup.causal)
        self.engine.runner = self.runner
        self.records: dict[str, Record] = {}
        self.refused = self.aborted = self.failed = self.unfit = 0
        self._expected: dict[str, str] = {}
        """Requests that must end in the coming step, and how."""

    @property
    def context(self) -> int:
        """Tokens that one sequence may have."""
        return self.engine.limits.max_model_len

    @property
    def unfinished(self) -> list[Record]:
        return [record for record in self.records.values() if not record.finished]

    # -- actions ----------------------------------------------------------------------------

    def add(
        self,
        prompt: SequenceOf[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        profile: Profile = EXACT,
        policy: int = 0,
        gang: int = 0,
        pruning: int = 0,
        begun: SequenceOf[int] = (),
        boundaries: tuple[int, ...] = (),
        pooling: Pooling | None = None,
        draft: Guessing | None = None,
    ) -> Record | None:
        """Add a request; ``None`` when the queue is full, or there is no room for a gang. Prompt
        and output are cut to fit.

        ``policy`` counts from 1 through those of the setup, and is 0 for none; so do ``pruning``
        and ``gang``, which goes before. Of a gang, ``begun`` is what every block begins with, and
        its number.
        """
        profile = self._with_methods(profile, policy, gang, pruning)
        if pruning and self.setup.pruning:
            params = replace(params, prompt_logprobs=None)
            pooling = pooling and "last"
        beginnings: list[list[int]] = []
        in_gang = gang_method(profile.methods, params.n) is not None and params.max_tokens != 0
        if in_gang and begun:
            beginnings = [[*begun, index] for index in range(params.n)]
        if draft is not None and self.setup.drafting:
            together = (*profile.methods, draft)
            if conflict(together) is None:
                profile = replace(profile, methods=together)
        request_id = f"request-{len(self.records) + self.refused + self.unfit}"
        prompt = list(prompt)
        full = self.engine.stats().waiting >= self.setup.waiting
        assert self.engine.queue_is_full == full
        try:
            limit = self.engine.check_request(prompt, params, pooling, profile, beginnings)
        except InvalidRequestError:
            self.unfit += 1
            assert gang_method(profile.methods, params.n) is not None
            assert not self._has_room(prompt, params.n, params.max_tokens or 1, beginnings)
            return None
        if gang_method(profile.methods, params.n) is not None and limit:
            assert self._has_room(prompt, params.n, limit, beginnings)
        try:
            self.engine.add_request(
                request_id,
                prompt,
                params,
                priority=priority,
                profile=profile,
                boundaries=boundaries,
                pooling=pooling,
                beginnings=beginnings,
            )
        except OverloadedError:
            assert full
            self.refused += 1
            return None
        except InvalidRequestError:
            # A compaction would take more pages than there are.
            assert profile.methods
            self.refused += 1
            return None
        assert not full
        scheduled = {s.request.request_id: s.request for s in self.engine.scheduler.waiting}
        request = scheduled.get(request_id)
        record = Record(request_id, prompt, params, limit, profile, request, pooling, beginnings)
        self.runner.beginnings[request_id] = beginnings
        record.tokens = [[] for _ in range(params.n)]
        record.reasons = [None] * params.n
        self.records[request_id] = record
        if record.request is None:
            assert limit == 0, "only a request that asks for nothing is never queued"
        return record

    def _with_methods(self, profile: Profile, policy: int, gang: int, pruning: int) -> Profile:
        """The profile with those of the setup that are chosen; see ``add``."""
        if policy and self.setup.policies:
            chosen = self.setup.policies[(policy - 1) % len(self.setup.policies)]
            profile = replace(profile, methods=(chosen,))
        if gang and self.setup.gangs:
            profile = replace(profile, methods=(self.setup.gangs[(gang - 1) % 2],))
        if pruning and self.setup.pruning:
            dropping = self.setup.pruning[(pruning - 1) % len(self.setup.pruning)]
            profile = replace(profile, methods=(dropping, *profile.methods))
            assert conflict(profile.methods) is None
        return profile

    def _has_room(
        self, prompt: list[int], count: int, limit: int, beginnings: SequenceOf[SequenceOf[int]]
    ) -> bool:
        """Whether a gang whose members generate ``limit`` tokens could run alone."""
        return count <= min(self.setup.rows, self.setup.tokens) and fits(
            len(prompt),
            [len(each) for each in beginnings] or [0] * count,
            limit,
            context=self.context,
            block_size=self.setup.block_size,
            pages=self.engine.stats().pages_total,
            groups=len(self.setup.windows),
        )

    def abort(self, record: Record) -> None:
        """Abort a request, be it running, waiting or over."""
        expected = not record.finished and self._expected.get(record.request_id) is None
        ended_at_once = record.request is None
        assert self.engine.abort_request(record.request_id) == (expected and not ended_at_once)
        if expected and not ended_at_once:
            self.aborted += 1
            self._expected[record.request_id] = "abort"
            held = {s.request.request_id for s in self.engine.scheduler.running}
            assert record.request_id not in held, "an aborted request holds pages"

    def step(self, fault: Fault | None = None) -> list[SequenceUpdate]:
        """One step; with a fault, exactly the requests in it fail."""
        scheduler, runner = self.engine.scheduler, self.runner
        busy = bool(len(scheduler.running) or len(scheduler.waiting))
        steps, now = runner.seen.steps, self.clock.now()
        runner.fault, runner.failed_requests = fault, set()
        try:
            updates = self.engine.step()
        except KeyboardInterrupt:
            for record in self.unfinished:
                self.abort(record)
            return self.step()
        finally:
            submitted = runner.fault is None and (runner.seen.steps > steps or fault is not None)
            runner.fault = None
        assert submitted == busy, "the engine idles, or works without work"
        assert self.clock.now() >= now
        for request_id in runner.failed_requests:
            self.failed += 1
            self._expected[request_id] = "error"
        for update in updates:
            self._apply(update)
        for request_id, reason in self._expected.items():
            assert self.records[request_id].finished, "a request outlives its end"
            assert reason in self.records[request_id].reasons
        self._expected.clear()
        return updates

    def drain(self) -> None:
        """Run everything to its end; then nothing may be left.

        The first sequence in order feeds at least one input in each step and is never preempted,
        so the number of steps is bounded by the inputs of all sequences.
        """
        bound = sum(record.longest for record in self.unfinished) + 1
        while self.engine.has_unfinished_requests:
            assert bound > 0, "a request starves"
            bound -= 1
            self.step()
            self.check()
        self.check_drained()

    # -- checks -----------------------------------------------------------------------------

    def check(self) -> None:
        """Invariants and counters, at any time."""
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert stats.generation_tokens == sum(
            len(tokens) for record in self.records.values() for tokens in record.tokens
        )
        assert stats.prompt_tokens == sum(len(record.prompt) for record in self.records.values())
        assert (stats.aborted, stats.failed) == (self.aborted, self.failed)
        assert stats.accepted_tokens <= stats.draft_tokens <= self.runner.seen.drafted
        assert 0 <= stats.pages_used <= stats.pages_total - stats.pages_cached
        assert stats.prefix_hit_tokens <= stats.prefix_query_tokens
        assert stats.running <= self.setup.rows
        held = {s.request.request_id for s in self.engine.scheduler.running}
        assert held <= {record.request_id for record in self.unfinished}

    def check_drained(self) -> None:
        """Nothing is held and every request is complete."""
        stats = self.engine.stats()
        assert not self.unfinished
        assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
        assert stats.pages_cached == 0 or self.setup.prefix_caching
        assert self.engine.step() == []

    def _apply(self, update: SequenceUpdate) -> None:
        record = self.records[update.request_id]
        assert not record.finished, "an update comes after the end"
        assert record.reasons[update.index] is None, "a sequence goes on after its end"
        record.tokens[update.index] += update.token_ids
        assert update.text == ""
        if update.prompt_logprobs is not None:
            self._check_scores(record, update.prompt_logprobs)
            if record.limit > 0:
                assert (update.index, len(record.tokens[0])) == (0, 1), "with the first token"
        if update.finish_reason is None:
            assert len(update.token_ids) == 1
        else:
            record.reasons[update.index] = update.finish_reason
            self._check_ending(record, update)
        if update.request_finished:
            assert None not in record.reasons
            record.finished = True
            self._check_request(record, update)
        else:
            assert update.metrics is None

    def _check_ending(self, record: Record, update: SequenceUpdate) -> None:
        tokens, ends = record.tokens[update.index], record.ends
        assert (update.error is not None) == (update.finish_reason == "error")
        if update.finish_reason in ("abort", "error"):
            assert update.finish_reason == self._expected[record.request_id]
            assert update.token_ids == []
        elif update.finish_reason == "stop":
            assert tokens[-1] in ends
            assert len(tokens) > record.params.min_tokens
            stopped_by = tokens[-1] if tokens[-1] in record.params.stop_ids else None
            assert update.stop_reason == stopped_by
        else:
            assert update.finish_reason == "length"
            assert len(tokens) == record.limit
            assert not tokens or tokens[-1] not in ends
        assert not set(tokens[:-1]) & set(ends), "a sequence goes on past its end"
        wanted = embedding(record) if update.finish_reason == "length" else None
        assert np.array_equal(update.embedding, wanted)  # type: ignore[arg-type]
        if tokens:
            self._check_tokens(record, update.index)

    def _check_tokens(self, record: Record, index: int) -> None:
        """Every token follows from the prompt, the tokens before it and the seed."""
        assert record.request is not None
        state = record.request.sequences[index].state
        assert state.output_token_ids == record.tokens[index]
        known = self._before_draws(record, index)
        for number, token in enumerate(record.tokens[index]):
            banned = record.ends if number < record.params.min_tokens else ()
            assert token == draw(known[number], state.seed, number, banned, VOCAB)

    @staticmethod
    def _before_draws(record: Record, index: int) -> list[int]:
        """The history from which each token of a sequence was drawn."""
        method = gang_method(record.profile.methods, record.params.n)
        if method is None:
            known = histories(record.profile, [*record.prompt, *record.tokens[index]])
            return known[len(record.prompt) - 1 :]
        start = histories(record.profile, record.prompt)[-1]
        begun = record.beginnings or [()] * record.params.n
        blocks = []
        for first, tokens, reason in zip(begun, record.tokens, record.reasons, strict=True):
            fed = tokens[:-1] if reason in ("stop", "length") else tokens
            blocks.append([*first, *fed])
        return [start, *block_histories(start, blocks, method)[index]][len(begun[index]) :]

    def _check_request(self, record: Record, update: SequenceUpdate) -> None:
        metrics = update.metrics
        assert metrics is not None and metrics.finished_time is not None
        times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time]
        happened = [time for time in times if time is not None]
        assert (
            happened == sorted(happened)
            and happened[-1] <= metrics.finished_time <= self.clock.now()
        )
        assert (metrics.first_token_time is not None) == any(record.tokens)
        assert metrics.num_cached_tokens < len(record.prompt)
        assert metrics.num_accepted_tokens <= metrics.num_draft_tokens
        if record.request is not None:
            seeds = [sequence.state.seed for sequence in record.request.sequences]
            assert len(set(seeds)) == record.params.n
        if not {"abort", "error"} & {*record.reasons}:
            wanted = record.params.prompt_logprobs is not None
            assert (record.prompt_logprobs is not None) == wanted

    def _check_scores(self, record: Record, scores: list[TokenLogprobs | None]) -> None:
        """The scores of a prompt come once, all together unless the request is cut short."""
        assert record.params.prompt_logprobs is not None
        assert record.prompt_logprobs is None
        known = histories(record.profile, record.prompt)
        expected = [None, *map(score, known, record.prompt[1:])]
        assert scores == expected[: len(scores)]
        cut = record.request_id in self._expected
        assert len(scores) == len(expected) or cut
        record.prompt_logprobs = scores
