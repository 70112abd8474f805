"""The sampler against plain definitions, transformers' processors, and statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from headrace.contracts.step import SampleState
from headrace.exec.sampling import sampler as sampler_module
from headrace.exec.sampling import wide
from headrace.exec.sampling.sampler import Drawn, Sampler
from headrace.exec.sampling.steps import uniform_numbers
from tests.exec.plain_sampling import END, make_state, probabilities

WIDE = 128_256
"""A vocabulary of today."""

CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_k": 10**30},
    {"min_p": 0.05},
    {"min_p": 1e-6},
    {"min_p": 1.0},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 0.9999999},
    {"top_p": 0.7, "temperature": 0.5},
    {"top_p": 0.8, "top_k": 12},
    {"top_p": 0.99, "min_p": 0.02, "top_k": 30, "temperature": 1.5},
]
CHANGES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.5},
    {"presence_penalty": -1.0, "frequency_penalty": 0.8},
    {"logit_bias": {5: 4.0, 0: -100.0}},
    {"min_tokens": 9},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {2: 3.0, END: 50.0},
        "min_tokens": 9,
        "top_p": 0.8,
        "temperature": 0.9,
    },
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(logits: Tensor, states: Sequence[SampleState]) -> list[Drawn]:
    """Draw once per row and leave ``logits`` as they are."""
    return Sampler().sample(logits.clone(), states)


def tokens(drawn: Sequence[Drawn]) -> list[int]:
    """The tokens of rows that all went well."""
    assert [row.error for row in drawn] == [None] * len(drawn)
    return [row.token for row in drawn]


def random_logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture
def evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a batch draw with evenly spread numbers in place of random ones."""

    def spread(states: Sequence[SampleState]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return ((np.arange(len(states)) + 0.5) / len(states)).astype(np.float32)

    monkeypatch.setattr(sampler_module, "uniform_numbers", spread)


def assert_drawn_from(logits: Tensor, params: dict[str, Any], draws: int = 300) -> None:
    """Evenly spread draws of one row meet each token as often as is expected, up to one.

    Each token has one interval of the numbers; only the ends of these may be off.
    """
    state = make_state(output=(5, 5, 2), **params)
    found = tokens(sample(logits.expand(draws, -1), [state] * draws))
    counts = np.bincount(found, minlength=len(logits))
    expected = probabilities(logits.double().numpy(), state)
    assert counts[expected == 0].sum() == 0
    assert np.abs(counts - draws * expected).max() <= 1.001


@pytest.mark.usefixtures("evenly")
@pytest.mark.parametrize("vocab", [6, 64, 9_001])
@pytest.mark.parametrize("params", CUTS + CHANGES, ids=str)
def test_tokens_are_drawn_as_defined(params: dict[str, Any], vocab: int) -> None:
    assert_drawn_from(random_logits(1, vocab)[0], params)


@pytest.mark.usefixtures("evenly")
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("params", [*CUTS, {"top_k": 60}, {"top_k": 128}], ids=str)
def test_equal_logits_share_their_fate(params: dict[str, Any], spread: float) -> None:
    few_values = random_logits(1, 1_000, spread).round() / 2
    assert_drawn_from(few_values[0], params)


@pytest.mark.usefixtures("evenly")
@pytest.mark.parametrize("params", CUTS, ids=str)
def test_half_precision_logits_are_widened(params: dict[str, Any]) -> None:
    logits = random_logits(1, 700).bfloat16()
    states = [make_state(**params)] * 50
    drawn = sample(logits.expand(50, -1), states)
    assert drawn == sample(logits.float().expand(50, -1), states)


def kept(monkeypatch: pytest.MonkeyPatch, logits: Tensor, params: dict[str, Any]) -> Tensor:
    """``[R, width]``: which tokens the cuts leave to be drawn."""
    seen: list[Tensor] = []

    class Watched(sampler_module.Candidates):
        def draw(self, numbers: Tensor) -> Tensor:
            seen.append(self.scores >= self.threshold)
            return super().draw(numbers)

    monkeypatch.setattr(sampler_module, "Candidates", Watched)
    sample(logits, [make_state(seed=row, **params) for row in range(len(logits))])
    (mask,) = seen
    return mask[:, : logits.shape[1]]


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_a_large_nucleus_is_what_a_full_sort_finds(
    monkeypatch: pytest.MonkeyPatch, spread: float, top_p: float
) -> None:
    logits = random_logits(2, WIDE, spread)
    mask = kept(monkeypatch, logits, {"top_p": top_p})
    ordered = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    size = (ordered.values.cumsum(dim=-1) < top_p).sum(dim=-1) + 1
    if spread:
        # A rounding of the sum may move the edge by a token.
        assert (mask.sum(dim=-1) - size).abs().max() <= 1
        for row in range(2):
            assert mask[row, ordered.indices[row, : size[row] - 1]].all()
    else:
        assert mask.all()


@pytest.mark.parametrize("top_k", [128, 129, 5_000, WIDE - 1])
def test_a_large_top_k_keeps_the_highest(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    logits = torch.stack([torch.randperm(WIDE).float() / 1_000 for _ in range(2)])
    mask = kept(monkeypatch, logits, {"top_k": top_k})
    expected = logits >= logits.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("params", [*CUTS, {"top_p": 0.95, "logprobs": 20}], ids=str)
def test_the_vocabulary_is_never_sorted(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("sorted")

    for owner, name in itertools.product((torch, Tensor), ("sort", "argsort", "msort")):
        monkeypatch.setattr(owner, name, refuse)
    topk = Tensor.topk

    def short_topk(self: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        assert k <= 128
        return topk(self, k, *args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", short_topk)
    tokens(sample(random_logits(2, WIDE, 0.1), [make_state(**params)] * 2))


class TestAgainstTransformers:
    """The same steps out of transformers' processors, in our order."""

    CHAINS = (
        ("TemperatureLogitsWarper", "temperature", (0.3, 0.7, 2.0)),
        ("TopKLogitsWarper", "top_k", (1, 5, 150)),
        ("MinPLogitsWarper", "min_p", (0.01, 0.2)),
        ("TopPLogitsWarper", "top_p", (0.2, 0.9, 0.999)),
    )

    def combinations(self) -> Iterator[dict[str, Any]]:
        choices = [[None, *values] for _, _, values in self.CHAINS]
        for chosen in itertools.product(*choices):
            names = [name for _, name, _ in self.CHAINS]
            yield {n: v for n, v in zip(names, chosen, strict=True) if v is not None}

    def test_cuts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = random_logits(3, 500)
        for params in self.combinations():
            if not params.keys() - {"temperature"}:
                continue
            scores = logits
            for kind, name, _ in self.CHAINS:
                if name in params:
                    scores = getattr(processors, kind)(params[name])(None, scores)
            with monkeypatch.context() as patch:
                mask = kept(patch, logits, params)
            assert torch.equal(mask, scores > -math.inf), params

    @pytest.mark.usefixtures("evenly")
    @pytest.mark.parametrize("penalty", [0.8, 1.5])
    def test_repetition_penalty(self, penalty: float) -> None:
        logits = random_logits(1, 40)
        state = make_state(prompt=(1, 2, 2, 7), output=(7, 9), repetition_penalty=penalty)
        ids = torch.tensor([[*state.prompt_token_ids, *state.output_token_ids]])
        processor = processors.RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(ids, logits.clone()).softmax(dim=-1)[0]
        found = tokens(sample(logits.expand(800, -1), [state] * 800))
        counts = torch.tensor(found).bincount(minlength=40)
        assert (counts - 800 * expected).abs().max() <= 1.001


class TestRowIndependence:
    """A row comes out the same, bit for bit, alone and among any others."""

    PARAMS = (
        *CUTS,
        *CHANGES,
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.5, "logprobs": 3},
        {"temperature": 0, "logprobs": 0},
        {"logprobs": 5},
        {"logprobs": 20, "top_p": 0.9},
    )

    @pytest.mark.parametrize(
        ("vocab", "spread", "threads"),
        [(50, 1.0, 1), (4_096, 0.5, 2), (WIDE, 0.5, 1), (WIDE, 4.0, 2)],
    )
    def test_alone_and_in_any_batch(self, vocab: int, spread: float, threads: int) -> None:
        torch.set_num_threads(threads)
        logits = random_logits(len(self.PARAMS), vocab, spread)
        logits[::2] = logits[::2].bfloat16().float()  # ties
        states = [
            make_state(seed=row, output=(5, 5, 2), **params)
            for row, params in enumerate(self.PARAMS)
        ]
        together = sample(logits, states)
        backwards = sample(logits.flip(0), states[::-1])[::-1]
        alone = [sample(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]
        assert together == backwards
        assert together == alone

    def test_many_draws(self) -> None:
        logits = random_logits(64, 1_000, 1.0)
        states = [
            make_state(seed=row, **params)
            for row, params in zip(range(64), itertools.cycle(CUTS), strict=False)
        ]
        together = sample(logits, states)
        assert together == [sample(logits[i : i + 1], [states[i]])[0] for i in range(64)]

    @pytest.mark.parametrize(
        ("value", "place"), [(math.nan, 17), (math.inf, 17), (-math.inf, slice(None))], ids=str
    )
    def test_broken_rows_fail_alone(self, value: float, place: int | slice) -> None:
        logits = random_logits(len(self.PARAMS), 300)
        logits[:, 40:] = -math.inf
        states = [make_state(seed=row, **params) for row, params in enumerate(self.PARAMS)]
        expected = sample(logits, states)
        for first in range(4):
            spoilt = logits.clone()
            spoilt[first::4, place] = value
            for row, drawn in enumerate(sample(spoilt, states)):
                if row % 4 == first:
                    assert drawn.error is not None and "not finite" in drawn.error
                    assert drawn.logprobs is None
                else:
                    assert drawn == expected[row]


class TestDraws:
    """The numbers that decide, and what becomes of them."""

    def test_numbers_are_uniform(self) -> None:
        one_seed = [make_state(seed=7, output=(0,) * count) for count in range(3_000)]
        many_seeds = [make_state(seed=seed) for seed in range(20_000)]
        golden = 0x9E3779B97F4A7C15
        siblings = [make_state(seed=(7 + index * golden) % 2**64) for index in range(20_000)]
        for states in (one_seed, many_seeds, siblings):
            numbers = uniform_numbers(states)
            assert numbers.dtype == np.float32
            assert numbers.min() >= 0 and numbers.max() < 1
            counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
            assert chi_square(counts, np.full(64, 1 / 64)) < 64 + 5 * math.sqrt(2 * 64)
            assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / math.sqrt(len(states))

    def test_streams_are_independent(self) -> None:
        states = [make_state(seed=seed) for seed in range(10_000)]
        streams = np.stack([uniform_numbers(states, stream) for stream in range(9)])
        correlations = np.corrcoef(streams) - np.eye(9)
        assert np.abs(correlations).max() < 5 / math.sqrt(len(states))
        assert np.array_equal(streams[0], uniform_numbers(states))

    def test_numbers_follow_from_seed_and_count(self) -> None:
        states = [
            make_state(seed=seed, prompt=prompt, output=output)
            for seed, prompt, output in itertools.product(
                (-1, 0, 1, 2**63 - 1, 2**64 - 2), ((0,), (1, 2)), ((), (4,), (9,), (4, 4))
            )
        ]
        numbers = uniform_numbers(states)
        by_cause: dict[tuple[int, int], set[float]] = {}
        for state, number in zip(states, numbers.tolist(), strict=True):
            by_cause.setdefault((state.seed, len(state.output_token_ids)), set()).add(number)
        assert all(len(found) == 1 for found in by_cause.values())
        assert len(set.union(*by_cause.values())) == len(by_cause)

    @pytest.mark.parametrize("vocab", [20, 2_000])
    @pytest.mark.parametrize("params", [{}, {"temperature": 2.0}, {"top_p": 0.9}, {"top_k": 15}])
    def test_tokens_follow_their_probabilities(self, params: dict[str, Any], vocab: int) -> None:
        draws = 5_000
        logits = random_logits(1, vocab, 1.0)
        states = [make_state(seed=seed, **params) for seed in range(draws)]
        found = tokens(sample(logits.expand(draws, -1), states))
        expected = probabilities(logits[0].double().numpy(), states[0])
        # Tokens are pooled so that each class is expected often enough.
        classes = (expected.cumsum() * 18).clip(max=17).astype(int)
        shares = np.bincount(classes, expected)
        counts = np.bincount(classes[found], minlength=len(shares))
        assert counts[shares == 0].sum() == 0
        counts, shares = counts[shares > 0], shares[shares > 0]
        assert chi_square(counts, shares) < len(counts) + 5 * math.sqrt(2 * len(counts))

    def test_seeds_reproduce_and_differ(self) -> None:
        logits = random_logits(1, 5_000, 1.0).expand(200, -1)
        states = [make_state(seed=seed) for seed in range(200)]
        assert sample(logits, states) == sample(logits, states)
        assert len(set(tokens(sample(logits, states)))) > 150
        later = [make_state(seed=seed, output=(1,)) for seed in range(200)]
        assert tokens(sample(logits, later)) != tokens(sample(logits, states))

    @pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
    @pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.99}, {"top_k": 300}], ids=str)
    def test_impossible_tokens_are_never_drawn(
        self, monkeypatch: pytest.MonkeyPatch, number: float, params: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(
            sampler_module, "uniform_numbers", lambda s: np.full(len(s), number, np.float32)
        )
        logits = torch.full((40, 9_000), -math.inf)
        for row in range(40):
            possible = torch.randperm(9_000)[: 1 + 10 * row]
            logits[row, possible] = torch.randn(len(possible)) * 20
        for row, token in enumerate(tokens(sample(logits, [make_state(**params)] * 40))):
            assert logits[row, token] > -math.inf

    def test_rounding_does_not_point_past_the_end(self) -> None:
        """Sums of a block in two orders differ; the last number is close to both."""
        weights = torch.rand(20_000, wide.BLOCK, generator=torch.Generator().manual_seed(5))
        weights[:, 50:] = 0
        found = wide.locate(weights, torch.full((20_000,), 1 - 2**-24))
        assert found.max() < 50


def chi_square(counts: Any, shares: Any) -> float:
    expected = counts.sum() * shares
    return float(((counts - expected) ** 2 / expected).sum())


class TestTemperature:
    @pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-30, 1e-6])
    @pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 300}, {"min_p": 0.1}], ids=str)
    def test_very_cold_is_greedy(self, temperature: float, cut: dict[str, Any]) -> None:
        logits = random_logits(20, 3_000, 1e4)
        states = [make_state(seed=i, temperature=temperature, **cut) for i in range(20)]
        assert tokens(sample(logits, states)) == logits.argmax(dim=-1).tolist()

    @pytest.mark.usefixtures("evenly")
    def test_very_hot_is_nearly_uniform(self) -> None:
        state = make_state(temperature=100.0)
        found = tokens(sample(random_logits(1, 50, 0.1).expand(5_000, -1), [state] * 5_000))
        counts = np.bincount(found, minlength=50)
        assert counts.min() >= 98 and counts.max() <= 102

    @pytest.mark.parametrize("vocab", [1, 63, 64, 65, 4_096, 5_001])
    def test_greedy_takes_the_first_of_the_highest(self, vocab: int) -> None:
        logits = random_logits(50, vocab).round()
        for dtype in (torch.float32, torch.bfloat16):
            states = [make_state(temperature=0, top_k=3, top_p=0.1)] * 50
            expected = [row.index(max(row)) for row in logits.tolist()]
            assert tokens(sample(logits.to(dtype), states)) == expected

    def test_greedy_sees_penalties_bias_and_bans(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 3.0, 9.0, 2.5, 0.0]])
        for params, output, expected in (
            ({}, (), END),
            ({"min_tokens": 1}, (), 2),
            ({"min_tokens": 1}, (0,), END),
            ({"min_tokens": 2, "logit_bias": {5: 3.5}}, (0,), 5),
            ({"min_tokens": 3, "presence_penalty": 1.0}, (2, 2), 4),
            ({"min_tokens": 3, "repetition_penalty": 1.3}, (2,), 4),
        ):
            state = make_state(output=output, temperature=0, **params)
            assert tokens(sample(logits, [state])) == [expected]

    def test_all_tokens_banned(self) -> None:
        state = SampleState(make_state(min_tokens=1).params, [0], [], 0, (0, 1, 2, 2))
        (drawn,) = sample(torch.zeros(1, 3), [state])
        assert drawn.error is not None


class TestLogprobs:
    """They are of the model's own distribution, whatever the chain makes of it."""

    @pytest.mark.parametrize("vocab", [30, 10_000])
    @pytest.mark.parametrize("top", [0, 1, 5, 20])
    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 0},
            {"temperature": 0.2, "top_k": 4},
            {"repetition_penalty": 2.0, "logit_bias": {4: 20.0}, "min_tokens": 9},
        ],
        ids=str,
    )
    def test_values_and_ranks(self, params: dict[str, Any], top: int, vocab: int) -> None:
        logits = random_logits(9, vocab)
        states = [
            make_state(seed=row, output=(5, 2), **params, logprobs=top if row % 3 else None)
            for row in range(9)
        ]
        expected = logits.double().log_softmax(dim=-1)
        for row, drawn in enumerate(sample(logits, states)):
            if row % 3 == 0:
                assert drawn.logprobs is None
                continue
            found = drawn.logprobs
            assert found is not None
            assert found.token_id == drawn.token
            assert found.logprob == pytest.approx(expected[row, drawn.token].item(), abs=1e-5)
            order = expected[row].argsort(descending=True)
            assert order[found.rank - 1] == drawn.token
            assert [token for token, _ in found.top] == order[:top].tolist()
            values = [value for _, value in found.top]
            assert values == pytest.approx(expected[row, order[:top]].tolist(), abs=1e-5)

    def test_more_than_there_are(self) -> None:
        (drawn,) = sample(random_logits(1, 10), [make_state(logprobs=100)])
        assert drawn.logprobs is not None
        assert sorted(token for token, _ in drawn.logprobs.top) == list(range(10))

    def test_impossible_tokens_are_no_alternatives(self) -> None:
        logits = torch.tensor([[0.0, -math.inf, 0.0]])
        (drawn,) = sample(logits, [make_state(logprobs=3)])
        assert drawn.logprobs is not None
        assert sorted(token for token, _ in drawn.logprobs.top) == [0, 2]
        assert drawn.logprobs.rank == 1
