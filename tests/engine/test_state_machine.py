"""A state machine over the composition that ``LLM`` uses: whatever happens, nothing is lost."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from headrace.contracts.profile import EXACT, Profile
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import Pooling
from headrace.engine.gangs.hogwild_inference import HogwildInference
from headrace.kv.policies.random_eviction import RandomEviction
from tests.engine.checking_runner import Fault, Guessing
from tests.engine.gang_checks import SeesPrevious
from tests.engine.harness import VOCAB, Harness, Setup, Watching
from tests.engine.hashed_slots import HashedSlots
from tests.engine.hashed_tokens import HashedTokens
from tests.engine.plain_units import PlainUnits

POLICIES = (
    (),
    (RandomEviction(0.3), RandomEviction(0.75, seed=1)),
    (HashedSlots(4, 4, 2), HashedSlots(3, 2, 1)),
    (HashedSlots(6, 4, 4), RandomEviction(0.5)),
    (PlainUnits(3, 1), PlainUnits(2, 1)),
)
PRUNING = (HashedTokens(4, 0.5), HashedTokens(3, 0.8), HashedTokens(6, 0.3))
GANGS = (HogwildInference(), SeesPrevious())
PROFILES = (
    EXACT,
    Profile(salt="tenant"),
    Profile(adapter="adapter@1"),
    Profile(methods=(Watching(),)),
)
FAULTS = ("early", "submit", "collect", "interrupt", "rows")


def is_composable(setup: Setup) -> bool:
    """Whether a model would be loaded so: policies and gangs need all pages of a sequence, and
    guesses a cache from which they can be taken back.
    """
    whole = setup.windows.count(None) == len(setup.windows) > 0 and not setup.states
    if setup.drafting and (setup.states or not setup.causal):
        return False
    if setup.pruning:
        fits = all(each.part <= setup.tokens - setup.rows + 1 for each in setup.pruning)
        coded = all(isinstance(policy, PlainUnits) for policy in setup.policies)
        return whole and setup.causal and fits and coded and not (setup.gangs or setup.drafting)
    if setup.policies or setup.gangs:
        return whole and setup.causal
    return whole or setup.causal


setups = st.builds(
    Setup,
    policy=st.sampled_from(("fcfs", "priority")),
    prefix_caching=st.booleans(),
    windows=st.sampled_from(
        ((None,), (None, None), (None,) * 3, (None, 5), (3,), (4, None, 4), ())
    ),
    states=st.booleans(),
    method_states=st.booleans(),
    block_size=st.sampled_from((1, 2, 3, 4)),
    pages=st.integers(3, 14),
    context=st.integers(4, 24),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 12),
    waiting=st.integers(1, 6),
    policies=st.sampled_from(POLICIES),
    gangs=st.sampled_from(((), GANGS)),
    pruning=st.sampled_from(((), (), PRUNING)),
    drafting=st.booleans(),
    causal=st.sampled_from((True, True, True, False)),
).filter(is_composable)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, are served, fail and are given up in any order."""

    @initialize(setup=setups, seed=st.integers(0, 2**16))
    def start(self, setup: Setup, seed: int) -> None:
        self.harness = Harness(setup)
        rng = random.Random(seed)
        # Requests begin with a part of one of few texts, so that they share prefixes.
        self.texts = [[rng.randrange(VOCAB) for _ in range(self.harness.context)] for _ in range(2)]

    @rule(
        text=st.integers(0, 1),
        share=st.floats(0, 1),
        own=st.lists(st.integers(0, VOCAB - 1), max_size=4),
        n=st.sampled_from((1, 1, 2, 3, 4)),
        most=st.one_of(st.none(), st.integers(0, 12)),
        least=st.integers(0, 3),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=2, unique=True),
        ignore_eos=st.booleans(),
        scored=st.booleans(),
        priority=st.integers(-1, 1),
        profile=st.sampled_from(PROFILES),
        policy=st.integers(0, 2),
        gang=st.integers(0, 2),
        pruning=st.integers(0, 3),
        begun=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        seed=st.one_of(st.none(), st.integers(0, 3)),
        ends=st.lists(st.integers(1, 24), max_size=2),
        pooling=st.sampled_from((None, None, None, "last", "mean", "first")),
        draft=st.sampled_from((None, Guessing(1), Guessing(3), Guessing(7), Guessing(3, False))),
    )
    def add(
        self,
        text: int,
        share: float,
        own: list[int],
        n: int,
        most: int | None,
        least: int,
        stops: list[int],
        ignore_eos: bool,
        scored: bool,
        priority: int,
        profile: Profile,
        policy: int,
        gang: int,
        pruning: int,
        begun: list[int],
        seed: int | None,
        ends: list[int],
        pooling: Pooling | None,
        draft: Guessing | None,
    ) -> None:
        context = self.harness.context
        prompt = (self.texts[text][: int(share * context)] + own)[: context - 1] or [1]
        if most is not None:
            most = min(most, context - len(prompt))
        params = SamplingParams(
            n=n,
            max_tokens=most,
            min_tokens=least if most is None else min(least, most),
            stop_token_ids=stops,
            ignore_eos=ignore_eos,
            prompt_logprobs=0 if scored else None,
            seed=seed,
        )
        boundaries = tuple(sorted({end for end in ends if end < len(prompt)}))
        if not self.harness.setup.causal:
            boundaries, pooling = (), pooling or "mean"
        if pooling is not None:
            params = SamplingParams(max_tokens=0)
        self.harness.add(
            prompt,
            params,
            priority=priority,
            profile=profile,
            policy=policy,
            gang=gang,
            pruning=pruning,
            begun=begun,
            boundaries=boundaries,
            pooling=pooling,
            draft=draft,
        )

    @rule(count=st.sampled_from((1, 1, 1, 2, 5)))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()
            self.harness.check()

    @precondition(lambda self: len(self.harness.engine.scheduler.running) > 0)
    @rule(kind=st.sampled_from(FAULTS), rows=st.integers(0, 31))
    def fail(self, kind: str, rows: int) -> None:
        self.harness.step(Fault(kind, rows))  # type: ignore[arg-type]

    @precondition(lambda self: self.harness.records)
    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice: random.Random) -> None:
        self.harness.abort(choice.choice(list(self.harness.records.values())))

    @precondition(lambda self: self.harness.unfinished)
    @rule(choice=st.randoms(use_true_random=False))
    def abort_unfinished(self, choice: random.Random) -> None:
        self.harness.abort(choice.choice(self.harness.unfinished))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()


EngineMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, report_multiple_bugs=False
)
TestEngineMachine = EngineMachine.TestCase
