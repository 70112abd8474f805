"""Requests at the edge of the engine: what is refused, how they end, what they report."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from headrace.config import EngineConfig
from headrace.contracts.outputs import SequenceUpdate
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.text import TextStream
from headrace.engine.engine import Engine
from headrace.errors import InvalidRequestError, OverloadedError
from headrace.plan.simulation import simulated_engine
from tests.engine.checking_runner import Fault
from tests.engine.harness import EOS, VOCAB, Harness, Setup, make_layout

CONTEXT = 16


class Letters(TextStream):
    """Token 1 is "a", 2 is "b", ...; a text ends before the letter that ``stop`` names.

    One letter is always held back, as if it could still change.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._stops = params.stop_strings
        self._held = ""
        self._stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        letter = chr(ord("a") + token_id - 1)
        released, self._held = self._held, letter
        if letter in self._stops:
            self._stopped_by, self._held = letter, ""
        return released

    def finish(self) -> str:
        released, self._held = self._held, ""
        return released

    @property
    def stopped_by(self) -> str | None:
        return self._stopped_by


def make_engine(tokens: list[int], *, seed: int | None = 0, max_num_waiting: int = 4) -> Engine:
    """An engine with text that samples ``tokens``, in order."""
    drawn = iter(tokens)
    engine, _ = simulated_engine(
        EngineConfig(block_size=4, max_num_waiting=max_num_waiting, seed=seed),
        layout=make_layout((None,), 4),
        num_pages=16,
        context=CONTEXT,
        vocab_size=VOCAB,
        draw_token=lambda: next(drawn),
        eos_token_ids=(EOS,),
    )
    engine._text = Letters
    return engine


def run(engine: Engine, **params: Any) -> list[SequenceUpdate]:
    """All updates of one request."""
    engine.add_request("request", [1, 2, 3], SamplingParams(**params))
    updates = []
    while engine.has_unfinished_requests:
        updates += engine.step()
        engine.check_integrity()
    return updates


def ending(updates: list[SequenceUpdate]) -> tuple[str, str | None, str | int | None]:
    """Text, reason and cause of the end of one sequence."""
    last = updates[-1]
    return "".join(update.text for update in updates), last.finish_reason, last.stop_reason


@pytest.mark.parametrize(
    ("field", "prompt", "params"),
    [
        ("prompt", [], {}),
        ("prompt", [VOCAB], {}),
        ("prompt", [1, -1], {}),
        ("prompt", [1] * (CONTEXT + 1), {"max_tokens": 0}),
        ("prompt", [1] * CONTEXT, {"max_tokens": None}),
        ("prompt", [1] * CONTEXT, {"max_tokens": 1}),
        ("max_tokens", [1] * 10, {"max_tokens": 7}),
        ("max_tokens", [1], {"max_tokens": 10**30}),
        ("stop_token_ids", [1], {"stop_token_ids": [VOCAB]}),
        ("stop_token_ids", [1], {"stop_token_ids": [-1]}),
        ("logit_bias", [1], {"logit_bias": {VOCAB: 1.0}}),
    ],
)
def test_a_request_that_cannot_run_is_refused(
    field: str, prompt: list[int], params: dict[str, Any]
) -> None:
    engine = make_engine([])
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request("request", prompt, SamplingParams(**params))
    assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")
    assert not engine.has_unfinished_requests
    assert engine.stats() == make_engine([]).stats()


def test_the_refusal_of_max_tokens_says_what_would_fit() -> None:
    with pytest.raises(InvalidRequestError, match="ask for at most 6"):
        make_engine([]).check_request([1] * 10, SamplingParams(max_tokens=7))


@pytest.mark.parametrize(
    ("length", "asked", "given"),
    [(10, 6, 6), (10, None, 6), (CONTEXT, 0, 0), (1, None, CONTEXT - 1), (CONTEXT - 1, 1, 1)],
)
def test_a_request_may_fill_the_context(length: int, asked: int | None, given: int) -> None:
    params = SamplingParams(max_tokens=asked)
    assert make_engine([]).check_request([1] * length, params) == given


def test_a_running_id_is_not_taken_twice_but_after_its_end() -> None:
    engine = make_engine([1, 1])
    engine.add_request("request", [1], SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequestError, match="request_id: 'request' is already running"):
        engine.add_request("request", [1], SamplingParams(max_tokens=1))
    engine.step()
    assert ending(run(engine, max_tokens=1)) == ("a", "length", None)


def test_a_priority_is_a_number() -> None:
    engine = make_engine([])
    with pytest.raises(InvalidRequestError, match="priority: must be an integer, got 'high'"):
        engine.add_request("request", [1], SamplingParams(), priority="high")  # type: ignore[arg-type]
    assert not engine.has_unfinished_requests


def test_a_full_queue_refuses_and_recovers() -> None:
    engine = make_engine([1] * 9, max_num_waiting=2)
    params = SamplingParams(max_tokens=1)
    for name in "ab":
        engine.add_request(name, [1], params)
    assert engine.queue_is_full
    with pytest.raises(OverloadedError) as caught:
        engine.add_request("c", [1], params)
    assert caught.value.retry_after > 0
    assert {update.request_id for update in engine.step()} == {"a", "b"}
    engine.add_request("c", [1], params)
    assert [update.request_id for update in engine.step()] == ["c"]


def test_nothing_asked_is_answered_without_a_step() -> None:
    engine = make_engine([])
    updates = run(engine, max_tokens=0, n=2)
    assert [(u.index, u.finish_reason, u.request_finished) for u in updates] == [
        (0, "length", False),
        (1, "length", True),
    ]
    assert engine.stats().steps == 0


def test_scoring_feeds_the_prompt_and_samples_nothing() -> None:
    engine = make_engine([])
    (update,) = run(engine, max_tokens=0, prompt_logprobs=0)
    assert update.prompt_logprobs is not None
    assert [s and s.token_id for s in update.prompt_logprobs] == [None, 2, 3]
    assert (update.token_ids, update.finish_reason) == ([], "length")


def test_end_of_sequence_ends() -> None:
    updates = run(make_engine([1, 2, EOS]), max_tokens=8)
    assert ending(updates) == ("ab", "stop", None)
    assert updates[-1].token_ids == [EOS], "the token is reported, its text is not"


def test_end_of_sequence_may_be_ignored() -> None:
    updates = run(make_engine([1, EOS, 2]), max_tokens=3, ignore_eos=True)
    assert ending(updates) == ("a`b", "length", None)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_ends_and_its_text_counts_as_a_stop_string(include: bool, text: str) -> None:
    updates = run(
        make_engine([1, 2, 3]),
        max_tokens=8,
        stop_token_ids=[3],
        include_stop_str_in_output=include,
    )
    assert ending(updates) == (text, "stop", 3)


def test_a_stop_string_ends() -> None:
    assert ending(run(make_engine([1, 2, 3]), max_tokens=8, stop="c")) == ("ab", "stop", "c")


def test_held_back_text_comes_with_the_end() -> None:
    updates = run(make_engine([1, 2, 3]), max_tokens=3)
    assert [update.text for update in updates] == ["", "a", "bc"]


def test_held_back_text_comes_with_an_abort() -> None:
    engine = make_engine([1, 2, 3])
    engine.add_request("request", [1], SamplingParams(max_tokens=8))
    assert [update.text for _ in range(2) for update in engine.step()] == ["", "a"]
    assert engine.abort_request("request") and not engine.abort_request("request")
    assert engine.stats().pages_used == 0
    (update,) = engine.step()
    assert (update.text, update.finish_reason, update.request_finished) == ("b", "abort", True)
    assert not engine.has_unfinished_requests


def test_each_completion_ends_for_itself() -> None:
    updates = run(make_engine([1, EOS, 2, 3, 4]), max_tokens=3, n=2)
    assert ending([u for u in updates if u.index == 0]) == ("abc", "length", None)
    assert ending([u for u in updates if u.index == 1]) == ("", "stop", None)
    assert [u.request_finished for u in updates].count(True) == 1


def test_seeds_come_from_the_request_or_else_from_the_engine() -> None:
    def seeds(engine: Engine, seed: int | None) -> list[int]:
        found = []
        for name in "ab":
            engine.add_request(name, [1], SamplingParams(seed=seed, n=2, max_tokens=1))
            found += [s.state.seed for s in engine.scheduler.waiting.items[-1].request.sequences]
        return found

    named = seeds(make_engine([]), 5)
    assert named[:2] == named[2:] == seeds(make_engine([], seed=9), 5)[:2]
    assert named[0] != named[1], "completions of one request differ"
    drawn = seeds(make_engine([]), None)
    assert len(set(drawn)) == 4 and drawn == seeds(make_engine([]), None)
    assert not set(drawn) & set(seeds(make_engine([], seed=1), None))
    assert not set(drawn) & set(seeds(make_engine([], seed=None), None))


def test_metrics_tell_when_things_happened() -> None:
    harness = Harness(Setup(tokens=4))
    harness.clock.advance(3.0)
    harness.add([1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
    harness.clock.advance(2.0)
    metrics = None
    times = []
    while metrics is None:
        updates = harness.step()
        times.append(harness.clock.now())
        metrics = next((u.metrics for u in updates if u.metrics), None)
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (3.0, 5.0)
    assert (metrics.first_token_time, metrics.finished_time) == (times[1], times[2])
    assert (metrics.num_cached_tokens, metrics.num_preemptions) == (0, 0)


def test_a_failed_step_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(Setup())
    harness.add([1, 2], SamplingParams(max_tokens=2))
    with caplog.at_level(logging.ERROR, "headrace"):
        (update,) = harness.step(Fault("collect"))
    assert update.error == "RuntimeError: injected into collect"
    (record,) = caplog.records
    assert record.exc_info is not None and "injected" in caplog.text


def test_times_of_a_step_are_reported() -> None:
    engine = make_engine([1])
    run(engine, max_tokens=1)
    assert engine.timings == {"plan": 0.0, "commit": 0.0}, "virtual time stands still meanwhile"


def test_a_failed_step_loses_no_states_of_sequences_beside_it() -> None:
    """Two parted before it, in which neither had a place: the copy of their state must come yet."""
    harness = Harness(Setup(policy="priority", states=True, tokens=1))
    assert harness.add([1], SamplingParams(n=2, max_tokens=4, ignore_eos=True))
    harness.step()
    urgent = harness.add([2], SamplingParams(max_tokens=2, ignore_eos=True), priority=-1)
    assert urgent is not None
    harness.step(Fault("early"))
    assert urgent.reasons == ["error"] and len(harness.unfinished) == 1
    harness.drain()
