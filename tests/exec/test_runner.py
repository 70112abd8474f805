"""Steps on a tiny model: batches, page work, forks, scores, failures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.contracts.step import StepPlan
from headrace.exec.batch import BatchBuilder
from tests.exec.builders import BLOCK, NAN_BYTE, Bench, make_bench, plan_row, sampling
from tests.gpu.checkpoint import VOCAB, write_checkpoint

A, B, C, D = (
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (11, 18, 7, 1)
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are small here: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bench(checkpoint: Path) -> Bench:
    return make_bench(checkpoint)


@pytest.fixture
def reference(checkpoint: Path) -> Bench:
    return make_bench(checkpoint, reference=True)


def alone(bench: Bench, ids: Sequence[int], row: int = 7) -> Tensor:
    """Logits after ``ids`` in one chunk, in a step of its own and fresh pages."""
    bench.deal(row, len(ids))
    _, (logits,) = bench.step(plan_row(row, ids))
    return logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestBatches:
    def test_inputs_of_all_rows_are_strung_together(self, bench: Bench) -> None:
        rows = [
            plan_row(0, A[2:7], slot=2),
            plan_row(1, [5], slot=9, positions=range(40, 41)),
            plan_row(2, C),
        ]
        (batch,) = BatchBuilder(bench.arena, bench.ops).build(rows, bench.tables)
        assert batch.input_ids.tolist() == [*A[2:7], 5, *C]
        assert batch.positions.tolist() == [*range(2, 7), 40, *range(7)]
        assert len(batch.attention) == 1

    def test_invariant_operations_get_one_input_each(self, reference: Bench) -> None:
        rows = [plan_row(0, A[:2]), plan_row(1, [5, 6, 7], slot=9, positions=range(40, 43))]
        batches = BatchBuilder(reference.arena, reference.ops).build(rows, reference.tables)
        assert [b.input_ids.tolist() for b in batches] == [[A[0]], [A[1]], [5], [6], [7]]
        assert [b.positions.tolist() for b in batches] == [[0], [1], [40], [41], [42]]

    @pytest.mark.parametrize("reference", [False, True])
    @pytest.mark.parametrize("grouped", [False, True])
    def test_rows_of_all_kinds_share_a_step(
        self, checkpoint: Path, reference: bool, grouped: bool
    ) -> None:
        bench = make_bench(checkpoint, reference=reference, grouped=grouped)
        expected = [alone(bench, ids) for ids in (A, B, C, D)]
        for row, ids in enumerate((A, B, C, D)):
            bench.deal(row, len(ids))
        bench.step(plan_row(0, A[:5], samples=()), plan_row(1, B[:-1], samples=()))
        results, logits = bench.step(
            plan_row(1, B[-1:], slot=len(B) - 1),
            plan_row(0, A[5:], slot=5),
            plan_row(2, C),
            plan_row(3, D),
        )
        for found, place, result in zip(logits, (1, 0, 2, 3), results, strict=True):
            assert_same(found, expected[place])
            assert result.tokens == (int(expected[place].argmax()),)
            assert result.error is None

    @pytest.mark.parametrize(
        ("dtype", "reference"), [("float32", False), ("float32", True), ("bfloat16", False)]
    )
    def test_a_cache_of_int8(self, checkpoint: Path, dtype: str, reference: bool) -> None:
        """Logits move a little; what is read is what was rounded, in chunks as in one piece."""
        exact = make_bench(checkpoint, dtype=dtype, reference=reference)
        rounded = make_bench(checkpoint, dtype=dtype, reference=reference, cache="int8")
        assert rounded.arena.num_bytes < exact.arena.num_bytes
        expected, found = alone(exact, B), alone(rounded, B)
        error, step = (found - expected).abs().max(), expected.abs().max() * 2**-7
        assert error < 4 * step
        if dtype == "float32":
            assert error > 0, "the cache is not rounded"
        rounded.deal(0, len(B))
        rounded.step(plan_row(0, B[:7], samples=()))
        _, (logits,) = rounded.step(plan_row(0, B[7:], slot=7))
        torch.testing.assert_close(
            logits, found, rtol=1e-4, atol=1e-4 if dtype == "float32" else 2 * float(step)
        )

    @pytest.mark.parametrize("cut", range(1, len(B)))
    def test_chunks_end_anywhere(self, bench: Bench, cut: int) -> None:
        bench.deal(0, len(B))
        bench.step(plan_row(0, B[:cut], samples=()))
        _, (logits,) = bench.step(plan_row(0, B[cut:], slot=cut))
        assert_same(logits, alone(bench, B))

    def test_a_step_without_samples_computes_no_logits(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.deal(0, len(A))
        monkeypatch.setattr(bench.model, "head", None)
        (result,), logits = bench.step(plan_row(0, A, samples=()))
        assert (result.tokens, result.scores, logits) == ((), [], [])

    def test_positions_are_not_slots(self, bench: Bench) -> None:
        """Only distances between positions matter, wherever the slots are."""
        expected = alone(bench, A)

        def with_positions(first: range, rest: range) -> Tensor:
            bench.deal(0, len(A))
            bench.step(plan_row(0, A[:6], samples=(), positions=first))
            return bench.step(plan_row(0, A[6:], slot=6, positions=rest))[1][0]

        assert_same(with_positions(range(100, 106), range(106, 111)), expected)
        gap = with_positions(range(6), range(16, 21))
        assert (gap - expected).abs().max() > 0.01

    def test_reference_mode_ignores_the_batch(self, reference: Bench) -> None:
        """Bit for bit: alone, in chunks and among others."""
        expected = alone(reference, B)
        for cut in (1, 5, 17):
            reference.deal(0, len(B))
            reference.deal(1, len(A) + 3)
            reference.step(plan_row(1, A), plan_row(0, B[:cut], samples=()))
            _, logits = reference.step(
                plan_row(1, C[:3], slot=len(A)), plan_row(0, B[cut:], slot=cut)
            )
            assert torch.equal(logits[1], expected)


class TestPages:
    def test_copies_take_every_layer_along(self, bench: Bench) -> None:
        """A fork whose last page is half full goes on in a copy of it."""
        pages = bench.deal(0, len(A))
        bench.step(plan_row(0, A, samples=()))
        (copy,) = bench.deal(1, 1)
        bench.tables[0, 1, : len(pages)] = [*pages[:-1], copy]
        bench.arena.pages[copy] = NAN_BYTE
        kept = bench.arena.pages[pages].clone()
        _, (logits,) = bench.step(plan_row(1, [9], slot=len(A)), copies=[(pages[-1], copy)])
        assert_same(logits, alone(bench, [*A, 9]))
        assert torch.equal(bench.arena.pages[pages], kept)

    def test_blank_pages_hide_what_was_in_them(self, bench: Bench) -> None:
        """Of two rows that are attended together, the shorter reads beyond its own slots."""
        expected = [alone(bench, ids) for ids in (A[:5], A[:7])]
        pages = [bench.deal(row, 8) for row in (0, 1)]

        def decode(blank: list[int]) -> list[Tensor]:
            bench.step(plan_row(0, A[:4], samples=()), plan_row(1, A[:6], samples=()))
            bench.arena.pages[pages[0][1]] = NAN_BYTE
            return bench.step(
                plan_row(0, A[4:5], slot=4), plan_row(1, A[6:7], slot=6), blank=blank
            )[1]

        for found, wanted in zip(decode([pages[0][1]]), expected, strict=True):
            assert_same(found, wanted)
        assert torch.isnan(decode([])[0]).any(), "the test shows nothing"

    def test_page_work_comes_before_the_inputs(self, bench: Bench) -> None:
        """Copied, then blanked, then written, as in a plan that frees a page and deals it anew."""
        source, target = bench.deal(0, 2 * BLOCK)
        bench.step(plan_row(0, A[:BLOCK], samples=()))
        before = bench.arena.pages[source].clone()
        bench.tables[0, 1, 0] = source
        _, (logits,) = bench.step(plan_row(1, C[:2]), copies=[(source, target)], blank=[source])
        assert torch.equal(bench.arena.pages[target], before)
        assert_same(logits, alone(bench, C[:2]))


class TestForks:
    def test_every_sample_is_drawn_from_the_same_logits(self, bench: Bench) -> None:
        bench.deal(0, len(A))
        bench.deal(1, len(C))
        states = [sampling(seed=seed, temperature=1.0, logprobs=2) for seed in range(40)]
        (forked, single), logits = bench.step(plan_row(0, A, samples=states), plan_row(1, C))
        assert len(forked.tokens) == len(forked.logprobs) == 40
        assert len(single.tokens) == 1
        expected = alone(bench, A)
        for row in logits[:40]:
            assert_same(row, expected)
        again = bench.sampler.sample(torch.stack(logits[:40]), states)
        assert list(forked.tokens) == [drawn.token for drawn in again]
        assert list(forked.logprobs) == [drawn.logprobs for drawn in again]
        assert len(set(forked.tokens)) > 5

    def test_a_change_of_scores_stays_with_its_sample(self, bench: Bench) -> None:
        bench.deal(0, len(A))
        best = int(alone(bench, A).argmax())
        states = [sampling(), sampling(logit_bias={best: -100.0}), sampling()]
        (result,), _ = bench.step(plan_row(0, A, samples=states))
        assert result.tokens[0] == result.tokens[2] == best
        assert result.tokens[1] != best

    def test_a_sample_that_fails_fails_the_row(self, bench: Bench) -> None:
        bench.deal(0, len(A))
        nothing_left = sampling(min_tokens=1)
        nothing_left.end_token_ids = tuple(range(VOCAB))
        for states in ([nothing_left, sampling()], [sampling(), nothing_left]):
            (result,), _ = bench.step(plan_row(0, A, samples=states))
            assert result.error is not None and len(result.tokens) == 2


class TestScores:
    @pytest.mark.parametrize("reference", [False, True])
    def test_values_in_pieces(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, reference: bool
    ) -> None:
        monkeypatch.setattr("headrace.exec.runner._SCORED_AT_ONCE", 4)
        bench = make_bench(checkpoint, reference=reference)
        expected = [alone(bench, B[: end + 1]) for end in range(len(B) - 1)]
        bench.deal(0, len(B))
        bench.deal(1, len(A))
        (scored,), _ = bench.step(plan_row(0, B[:6], samples=(), score_ids=B[1:7], score_top=3))
        (other, rest), logits = bench.step(
            plan_row(1, A, score_ids=A[1:4]),
            plan_row(0, B[6:], slot=6, score_ids=B[7:], score_top=3),
        )
        assert len(other.scores) == 3 and all(score.top == () for score in other.scores)
        assert len(logits) == 2
        found = [*scored.scores, *rest.scores]
        assert [score.token_id for score in found] == B[1:]
        for score, row in zip(found, expected, strict=True):
            logprobs = row.log_softmax(dim=-1)
            assert score.logprob == pytest.approx(logprobs[score.token_id].item(), abs=1e-3)
            assert score.rank == int((row > row[score.token_id]).sum()) + 1
            best = logprobs.topk(3)
            assert [token for token, _ in score.top] == best.indices.tolist()
            values = [value for _, value in score.top]
            assert values == pytest.approx(best.values.tolist(), abs=1e-3)


class TestFailures:
    BROKEN = 13

    @pytest.fixture(params=[False, True], ids=["fast", "reference"])
    def broken(
        self, checkpoint: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Bench:
        """A model that computes NaN from one token."""
        bench = make_bench(checkpoint, reference=request.param)
        embed = bench.model.embed

        def broken_embed(ids: Tensor, positions: Tensor) -> Tensor:
            return embed(ids, positions).masked_fill((ids == self.BROKEN).unsqueeze(1), torch.nan)

        monkeypatch.setattr(bench.model, "embed", broken_embed)
        return bench

    def test_a_row_fails_alone(self, broken: Bench) -> None:
        good = [token for token in A if token != self.BROKEN]
        expected = alone(broken, good)
        for order in itertools.permutations(range(3)):
            rows = [
                plan_row(0, good),
                plan_row(1, [*C, self.BROKEN, 4]),
                plan_row(2, [*C[:2], self.BROKEN], samples=[sampling(temperature=1.0)] * 2),
            ]
            for row in rows:
                broken.deal(row.table_row, len(row.input_ids))
            results, logits = broken.step(*[rows[place] for place in order])
            by_row = dict(zip(order, results, strict=True))
            assert by_row[0].error is None
            assert by_row[0].tokens == (int(expected.argmax()),)
            assert len(logits) == 4
            for place in (1, 2):
                error = by_row[place].error
                assert error is not None and "NaN" in error

    def test_scores_fail_alone(self, broken: Bench) -> None:
        ids = [*C, self.BROKEN, 4, 5]
        broken.deal(0, len(ids))
        broken.deal(1, len(C))
        bad, good = broken.step(
            plan_row(0, ids, samples=(), score_ids=ids[1:]),
            plan_row(1, C, samples=(), score_ids=C[1:]),
        )[0]
        assert bad.error is not None and "NaN" in bad.error
        assert good.error is None and len(good.scores) == len(C) - 1


def test_results_wait_for_their_ticket(bench: Bench) -> None:
    for row, ids in enumerate((A, C)):
        bench.deal(row, len(ids))
    tickets = [
        bench.runner.submit(StepPlan([plan_row(row, ids)]), bench.tables)
        for row, ids in enumerate((A, C))
    ]
    results = [bench.runner.collect(ticket) for ticket in reversed(tickets)][::-1]
    for ids, result in zip((A, C), results, strict=True):
        assert result.rows[0].tokens == (int(alone(bench, ids).argmax()),)
        assert result.timings.keys() == {"batch", "forward", "sample"}
        assert all(seconds >= 0 for seconds in result.timings.values())
