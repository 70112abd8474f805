"""A second model says what transformers says of what it sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import PlanRow, SampleState
from headrace.exec.decoding import second_model
from headrace.exec.decoding.drafter import DraftParts, Guess
from headrace.exec.decoding.second_model import SecondModel
from headrace.exec.forward import LoadedModel
from headrace.exec.sampling.sampler import Sampler
from tests.exec.builders import BLOCK, NAN_BYTE, load_model
from tests.models.expected import TOLERANCE, prompt_of
from tests.support.checkpoints import CONFIGS, CONTEXT, VOCAB, make_model, save_checkpoint

WINDOW, SINKS = 20, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(CONFIGS["qwen3"]())


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


def open_second(
    directory: Path, model: Any, window: int, vocab: int = VOCAB, sinks: int = SINKS
) -> SecondModel:
    loaded, ops = load_model(directory, "float32", "cpu", reference=False)
    states = tuple(type(loaded).layer_states(model.config.to_dict(), "float32"))
    parts = DraftParts(
        target=None,  # type: ignore[arg-type]
        sampler=Sampler(),
        load=lambda path: NotImplemented,
        table_rows=2,
        context=200,
        vocab_size=vocab,
    )
    second = SecondModel(LoadedModel(loaded, ops, states, CONTEXT, BLOCK), parts, window, sinks)
    second._forward.arena.pages.fill_(NAN_BYTE)
    return second


def guess_for(sequence: int, table_row: int, tokens: list[int]) -> Guess:
    place = len(tokens) - 1
    row = PlanRow(sequence, table_row, tokens[-1:], range(place, place + 1), place)
    return Guess(row, SampleState(SamplingParams(), tokens, [], 0), 4)


def check(second: SecondModel, model: Any, *guesses: Guess, seen: list[list[int]]) -> None:
    with torch.inference_mode():
        found = second.next_logits(guesses)
        for row, text in zip(found, seen, strict=True):
            should = model(torch.tensor([text])).logits[0, -1]
            assert (row - should).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk", [5, 512])
def test_texts_grow_and_are_taken_back(
    model: Any, directory: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_model, "_CHUNK", chunk)
    second = open_second(directory, model, window=0)
    one, two = prompt_of(30), prompt_of(9)
    first, other = guess_for(1, 0, one), guess_for(2, 1, two)
    check(second, model, first, other, seen=[one, two])
    first.tokens.append(5)
    check(second, model, first, seen=[[*one, 5]])
    first.tokens.append(6)
    check(second, model, first, seen=[[*one, 5, 6]])
    second.forget(first.row, 31)
    longer = [*one, 5, 8, 9]
    check(second, model, guess_for(1, 0, longer), other_grown(other), seen=[longer, [*two, 4]])
    # Another sequence gets the place of the first, which comes back to the other's.
    new = prompt_of(17)
    check(second, model, guess_for(3, 0, new), guess_for(1, 1, longer), seen=[new, longer])


def other_grown(guess: Guess) -> Guess:
    guess.tokens.append(4)
    return guess


def test_windows_begin_anew(model: Any, directory: Path) -> None:
    """First tokens and recent ones, half of the window together, at positions from 0 on."""
    second = open_second(directory, model, WINDOW)
    text = prompt_of(60)
    seen, start = [], 0
    for length in range(12, 45):
        if SINKS * (start > 0) + length - start > WINDOW:
            start = length - (WINDOW // 2 - SINKS)
            assert start > SINKS
        visible = text[:length] if start == 0 else [*text[:SINKS], *text[start:length]]
        check(second, model, guess_for(1, 0, text[:length]), seen=[visible])
        seen.append(len(visible))
    assert (min(seen), max(seen)) == (WINDOW // 2, WINDOW)
    tokens = [*text[:44], 1, 2]
    second.forget(guess_for(1, 0, text[:44]).row, 44)
    visible = [*text[:SINKS], *text[start:44], 1, 2]
    check(second, model, guess_for(1, 0, tokens), seen=[visible])
    # Back to before what it sees: it begins anew.
    second.forget(guess_for(1, 0, text[:44]).row, start)
    earlier = text[: start + 1]
    assert len(earlier) > WINDOW
    visible = [*text[:SINKS], *earlier[len(earlier) - (WINDOW // 2 - SINKS) :]]
    check(second, model, guess_for(1, 0, earlier), seen=[visible])


def test_vocabularies_are_brought_to_the_same_size(model: Any, directory: Path) -> None:
    for vocab in (VOCAB - 10, VOCAB + 10):
        second = open_second(directory, model, 0, vocab)
        with torch.inference_mode():
            [row] = second.next_logits([guess_for(1, 0, prompt_of(5))])
        assert len(row) == vocab
        assert bool(row[:VOCAB].isfinite().all())
        assert row[VOCAB:].tolist() == [-math.inf] * max(0, vocab - VOCAB)


def test_caches_that_are_too_large(
    model: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(second_model, "KVArena", full)
    with pytest.raises(ValueError, match=r"a cache of 20 tokens for each of 2 .*: no memory"):
        open_second(directory, model, WINDOW)


def test_windows_that_are_too_small(model: Any, directory: Path) -> None:
    with pytest.raises(ValueError, match="it sees 20 tokens at most"):
        open_second(directory, model, WINDOW, sinks=6)
