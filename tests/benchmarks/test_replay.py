"""Decisions that were recorded are taken again, whatever the model says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from headrace import LLM, SamplingParams
from headrace.loading import embedded_model

GREEDY = SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True)
PROMPT = "import os\n\n\ndef main("
SMALL = f"model={embedded_model()},adaptive=false"


@pytest.fixture
def replay(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from cards import replay

    module: ModuleType = replay
    return module


def tokens_of(llm: LLM) -> list[int]:
    [output] = llm.generate(PROMPT, GREEDY)
    assert output.error is None
    return output.outputs[0].token_ids


def test_a_model_that_guesses_for_itself_is_always_right(replay: ModuleType) -> None:
    with (
        LLM(methods=(f"draft-model:{SMALL},length=3",)) as llm,
        replay.acceptances_of("draft-model") as found,
    ):
        plain = tokens_of(llm)
        assert len(plain) == 25
        stats = llm.stats()
    assert found.share(0) == stats.accepted_tokens / stats.draft_tokens > 0.9
    assert set(found.counts) <= {(0, length) for length in range(1, 4)}
    assert found.length(0) == 1 + stats.accepted_tokens / stats.drafts


def test_what_was_accepted_is_accepted_again(replay: ModuleType) -> None:
    """Of chains of 3, one and none in turn; of shorter ones, at the end, the same share."""
    recorded = replay.Acceptances()
    for accepted in (1, 0):
        recorded.note(0, 3, accepted)
    with (
        LLM(methods=(f"draft-model:{SMALL},length=3",)) as llm,
        replay.acceptances_of("draft-model"),
        replay.accepting("draft-model", recorded),
    ):
        assert len(tokens_of(llm)) == 25
        stats = llm.stats()
    assert stats.drafts > 12
    assert abs(stats.accepted_tokens - stats.drafts / 2) <= 1


def test_two_levels(replay: ModuleType) -> None:
    """What the upper one guesses, and how much of that stays, are apart."""
    recorded = replay.Acceptances()
    recorded.note(1, 2, 2)
    recorded.note(0, 6, 2)
    options = f"triforce:{SMALL},length=6,small_length=2,window=64,budget=16"
    with LLM(methods=(options,)) as llm, replay.accepting("triforce", recorded):
        assert len(tokens_of(llm)) == 25
        stats = llm.stats()
    # Rounds of three are guessed; near the end chains are shorter.
    assert stats.draft_tokens / stats.drafts > 4
    assert abs(stats.accepted_tokens / stats.draft_tokens - 1 / 3) < 0.1


def test_rows_leave_as_they_did(replay: ModuleType) -> None:
    """Whatever the threshold says: none, and all."""
    with LLM() as llm:
        plain = tokens_of(llm)
    with LLM(methods=("early-exit:layers=1,threshold=0",)) as llm:
        with replay.leaving() as seen:
            early = tokens_of(llm)
        assert early != plain and all(seen.left) and len(seen.left) == len(seen.sure) > 12
        with replay.leaving_as(replay.Leaving(left=[False])):
            assert tokens_of(llm) == plain
    with (
        LLM(methods=("early-exit:layers=1,threshold=2",)) as llm,
        replay.leaving_as(replay.Leaving(left=[True])),
    ):
        assert tokens_of(llm) == early
