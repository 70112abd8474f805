"""What the parts of ``method_cards`` share: sizes, models, rounds in turn, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from harness import progress
from make_checkpoint import ensure_checkpoint, ensure_packed

from headrace import LLM, RequestOutput, SamplingParams
from headrace.cli.bench.engine import random_prompts
from headrace.contracts.profile import Profile
from headrace.contracts.stats import EngineStats
from headrace.evaluation.measured import PLAIN, Measurement
from headrace.evaluation.statistics import Estimate
from headrace.methods import Choice

ZOO = Path(__file__).parents[2] / "zoo" / "models"
ON = "on"
"""The side that has the method with the options of its engine."""

Value = TypeVar("Value")
Rows = dict[str, list[Measurement]]
"""Method -> what a part has measured of it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How much is measured.

    Args:
        rounds: of what is timed.
        quick: tiny sizes, only to see that it works.
    """

    rounds: int
    quick: bool

    def of(self, full: Value, quick: Value) -> Value:
        """The one or the other."""
        return quick if self.quick else full

    def shape(self) -> tuple[str, str]:
        """The shape of what is timed, and how it is called in tables."""
        return self.of("llama-3.2-1b", "tiny"), self.of("Llama-3.2-1B's shape", "tiny shape")

    def checkpoint(self) -> tuple[Path, str]:
        """It in bfloat16, and its name in tables."""
        shape, name = self.shape()
        return ensure_checkpoint(shape), f"{name}, random weights, bf16"

    def packed(self) -> tuple[Path, str]:
        """It in 4 bits, and its name in tables."""
        shape, name = self.shape()
        return ensure_packed(shape, "w4a8"), f"{name}, random weights, w4a8"


def trained(name: str) -> tuple[Path, str]:
    """A model of the zoo, and its name in tables."""
    return ZOO / name, f"zoo/models/{name}"


def alone(context: int, sequences: int = 8) -> dict[str, Any]:
    """Options of an engine that finds nothing again, with room for few sequences."""
    return {
        "enable_prefix_caching": False,
        "max_model_len": context,
        "max_num_seqs": sequences,
    }


@dataclass(frozen=True, slots=True)
class Times:
    """Of one call.

    Args:
        first: seconds to the first token.
        rate: tokens decoded per second behind it, of all sequences together.
    """

    first: float
    rate: float


def times_of(outputs: Sequence[RequestOutput]) -> Times:
    """Of requests that were handed in together."""
    begun, ended, firsts, tokens = [], [], [], 0
    for output in outputs:
        metrics = output.metrics
        assert output.error is None and metrics is not None
        assert metrics.first_token_time is not None and metrics.finished_time is not None
        firsts.append(metrics.first_token_time - metrics.arrival_time)
        begun.append(metrics.first_token_time)
        ended.append(metrics.finished_time)
        tokens += sum(len(each.token_ids) - 1 for each in output.outputs)
    spans = [end - start for start, end in zip(begun, ended, strict=True)]
    return Times(max(firsts), tokens / max(*spans, 1e-9))


def greedy(tokens: int, **options: Any) -> SamplingParams:
    """Requests of one length."""
    return SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False, **options
    )


def in_turn(
    llm: LLM,
    setup: Setup,
    sides: Mapping[str, Choice | None],
    prompts: Callable[[int], Sequence[list[int]]],
    params: SamplingParams,
) -> dict[str, list[Times]]:
    """Give all sides the same prompts in every round, who begins alternating.

    Args:
        sides: label -> the methods of its requests.
        prompts: number of the round -> prompts; round 0 warms up.
    """
    found: dict[str, list[Times]] = {label: [] for label in sides}
    for number in range(setup.rounds + 1):
        given = [{"prompt_token_ids": ids} for ids in prompts(number)]
        order = list(sides.items())
        for label, choice in order[::-1] if number % 2 else order:
            outputs = llm.generate(given, params, methods=choice, use_tqdm=False)
            if number:
                found[label].append(times_of(outputs))
        progress(f"  round {number} of {setup.rounds}")
    return found


def fresh_prompts(llm: LLM, count: int, length: int) -> Callable[[int], list[list[int]]]:
    """New random ones for every round; those that warm up are short."""
    vocabulary = min(4000, llm.model_info.vocab_size)

    def make(number: int) -> list[list[int]]:
        return random_prompts(
            count, length if number else min(256, length), vocabulary, seed=number
        )

    return make


def watched(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, choice: Choice | None
) -> Iterator[tuple[EngineStats, int]]:
    """The engine's figures after every step, and how many requests it gave tokens to."""
    profile = Profile(llm.methods.choose(choice))
    for number, prompt in enumerate(prompts):
        llm.engine.add_request(f"watched-{number}", prompt, params, profile=profile)
    while llm.engine.has_unfinished_requests:
        updates = llm.engine.step()
        failed = [update.error for update in updates if update.error is not None]
        assert not failed, failed[0]
        yield llm.stats(), len({update.request_id for update in updates if update.token_ids})


def timed_rows(
    found: Mapping[str, Sequence[Times]],
    about: Mapping[str, Any],
    *,
    label: str = ON,
    key: str = "rate",
    what: str = "decoding, tokens/s",
    claim: str = "",
) -> list[Measurement]:
    """What a side took, and how much of the plain one's speed that is, round by round.

    Args:
        key: "rate", of which more is better, or "first", of which less is.
        about: further fields of the rows.
    """
    sides = {name: [getattr(each, key) for each in times] for name, times in found.items()}
    own, plain = sides[label], sides[PLAIN]
    pairs = zip(own, plain, strict=True)
    ratios = [a / b if key == "rate" else b / a for a, b in pairs]
    sample = f"{len(own)} rounds"
    beside = {PLAIN: median(plain)}
    of_plain = f"{what.split(',')[0]}: speed, plain = 1"
    return [
        Measurement(what, median(own), sample, low=min(own), high=max(own), beside=beside, **about),
        Measurement(
            of_plain,
            median(ratios),
            sample,
            low=min(ratios),
            high=max(ratios),
            beside={PLAIN: 1.0},
            claim=claim,
            **about,
        ),
    ]


def estimated(what: str, estimate: Estimate, sample: str, **fields: Any) -> Measurement:
    """A row of a mean and its interval."""
    return Measurement(what, estimate.mean, sample, low=estimate.low, high=estimate.high, **fields)
