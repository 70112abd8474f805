"""Views: what is read are the chosen pages at their own positions, and what came since."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.contracts.step import PlanRow
from headrace.exec.decoding.drafters.triforce import RetrievedPages
from headrace.exec.forward import Forward
from headrace.exec.page_view import ChosenPages
from headrace.ops.paged import PagedPlane
from tests.exec.builders import BLOCK, Bench, make_bench
from tests.models.expected import TOLERANCE, prompt_of
from tests.support.checkpoints import CONFIGS, make_model, save_checkpoint

PAGES = 3
"""That are chosen."""
LENGTHS = (45, 38, 6)


class LastAndFirst(ChosenPages):
    """The last page and the first ones; counts how often it is asked."""

    asked = 0

    def choose(self, keys: PagedPlane, pages: Tensor, query: Tensor, count: int) -> Tensor:
        self.asked += 1
        return torch.tensor([len(pages) - 1, *range(count - 1)])


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(CONFIGS["llama3"]())


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("llama3"))


def expected_logits(model: Any, tokens: list[int], first: int, pages: set[int] | None) -> Tensor:
    """``[len(tokens), vocab]``: from place ``first`` on, of full pages only these are seen."""
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for page in range(first // BLOCK):
        if pages is not None and page not in pages:
            mask[first:, page * BLOCK : (page + 1) * BLOCK] = False
    addend = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), attention_mask=addend[None, None])
    logits: Tensor = out.logits[0].float()
    return logits


def prefill(bench: Bench, forward: Forward, number: int, text: list[int]) -> PlanRow:
    """Put a text into the cache; the row that feeds its last token, with room for more."""
    bench.deal(number, len(text) + 8)
    past = len(text) - 1
    forward.hidden([PlanRow(number, number, text[:past], range(past), 0)], bench.tables)
    return PlanRow(number, number, text[past:], range(past, past + 1), past, draft_room=8)


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_chosen_pages_are_read(model: Any, directory: Path, reference: bool) -> None:
    """Three times in a row, the last time with some tokens taken back."""
    bench = make_bench(directory, reference=reference)
    forward = Forward(bench.model, bench.arena, bench.ops)
    view = LastAndFirst(bench.arena, PAGES * BLOCK, refresh=100)
    texts = [prompt_of(length) for length in LENGTHS]
    with torch.inference_mode():
        rows = [prefill(bench, forward, *pair) for pair in enumerate(texts)]
        view.begin(rows, bench.tables)
        for done, kept, ids in ((0, [], None), (1, [], [7, 8, 9]), (2, [7], [5, 6])):
            fed = []
            for row, text in zip(rows, texts, strict=True):
                start, new = row.positions.start + done, ids or text[-1:]
                positions, slot = range(start, start + len(new)), view.slot(row) + done
                fed.append(PlanRow(row.sequence, row.table_row, new, positions, slot))
            parts = forward.logits(forward.hidden(fed, bench.tables, view)).split(len(ids or [0]))
            for part, text in zip(parts, texts, strict=True):
                tokens, first = [*text, *kept, *(ids or [])], len(text) - 1
                full = first // BLOCK
                chosen = {full - 1, *range(PAGES - 1)} if full > PAGES else None
                should = expected_logits(model, tokens, first, chosen)[-len(part) :]
                assert (part - should).abs().max() < TOLERANCE
                whole = expected_logits(model, tokens, first, None)[-len(part) :]
                assert ((part - whole).abs().max() > 0.01) == (chosen is not None)
    assert view.asked == 2 * sum(length // BLOCK > PAGES for length in LENGTHS)


def test_pages_are_chosen_again_rarely(directory: Path) -> None:
    bench = make_bench(directory)
    view = LastAndFirst(bench.arena, BLOCK, refresh=5)
    bench.deal(0, 60)

    def asked(sequence: int, slot: int) -> int:
        row = PlanRow(sequence, 0, [1], range(slot, slot + 1), slot)
        before = view.asked
        view.begin([row], bench.tables)
        forward = Forward(bench.model, bench.arena, bench.ops)
        fed = PlanRow(sequence, 0, [1], row.positions, view.slot(row))
        with torch.inference_mode():
            forward.hidden([fed], bench.tables, view)
        return view.asked - before

    layers = 2
    assert [asked(1, slot) for slot in (20, 21, 24)] == [layers, 0, 0]
    assert [asked(1, slot) for slot in (25, 29, 30)] == [layers, 0, layers]
    assert asked(2, 31) == layers, "another sequence in the same place"


def test_pages_are_retrieved_by_mean_keys(directory: Path) -> None:
    bench = make_bench(directory)
    view = RetrievedPages(bench.arena, BLOCK, refresh=1)
    keys = bench.arena.cache(1).keys
    generator = torch.Generator().manual_seed(0)
    pages = torch.tensor([9, 4, 30, 2, 17, 11])
    for page in pages:
        for strip in keys.strips:
            strip[page] = torch.randn(BLOCK, keys.width, generator=generator)
    query = torch.randn(2 * keys.heads, keys.width, generator=generator) * 3
    votes = [0.0] * len(pages)
    for head in range(len(query)):
        strip = keys.strips[head // 2]
        scores = [float(query[head] @ strip[page].mean(0)) for page in pages]
        shares = torch.softmax(torch.tensor(scores) / keys.width**0.5, 0).tolist()
        votes = [sum(pair) for pair in zip(votes, shares, strict=True)]
    ranked = sorted(range(len(pages)), key=lambda place: -votes[place])
    for count in (1, 3, 5):
        chosen = view.choose(keys, pages, query, count).tolist()
        assert sorted(chosen) == sorted(itertools.islice(ranked, count))
