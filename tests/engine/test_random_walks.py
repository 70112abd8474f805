"""Long random walks over the composition that ``LLM`` uses, which prove that the hard situations
really occur while every token, page and update is accounted for.
"""

from __future__ import annotations

import random
from collections import Counter

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

GANGS = (HogwildInference(), SeesPrevious())
SETUPS = (
    Setup(pages=9, rows=4, tokens=6),
    Setup(policy="priority", pages=9, rows=4, tokens=6),
    Setup(policy="priority", pages=12, rows=1, tokens=4, waiting=4),
    Setup(windows=(None, None), pages=10, rows=5, tokens=9, block_size=3),
    Setup(policy="priority", windows=(None, None), pages=8, rows=4, tokens=5),
    Setup(prefix_caching=False, pages=9, rows=4, tokens=6),
    Setup(pages=10, rows=6, tokens=1),
    Setup(pages=12, rows=6, tokens=3),
    Setup(policy="priority", pages=14, rows=6, tokens=3),
    Setup(block_size=1, pages=22, rows=4, tokens=7),
    Setup(block_size=8, pages=6, rows=6, tokens=16),
    Setup(pages=16, rows=2, tokens=6),
    Setup(pages=9, rows=4, tokens=6, policies=(RandomEviction(0.5),)),
    Setup(windows=(None, None), pages=8, rows=5, tokens=9, policies=(RandomEviction(0.2),)),
    Setup(pages=9, rows=4, tokens=6, policies=(HashedSlots(4, 4, 2),)),
    Setup(windows=(None, None), pages=12, rows=5, tokens=9, policies=(HashedSlots(3, 2, 1),)),
    Setup(pages=30, rows=3, tokens=6, context=24, policies=(HashedSlots(2, 2, 1),)),
    Setup(pages=12, rows=4, tokens=6, policies=(PlainUnits(3, 1),)),
    Setup(pages=14, rows=4, tokens=6, block_size=8, context=60, policies=(PlainUnits(4, 3),)),
    Setup(windows=(None, 5), pages=9, rows=4, tokens=6),
    Setup(policy="priority", windows=(4,), pages=7, rows=5, tokens=5, block_size=3),
    Setup(windows=(7, None, 7), pages=10, rows=5, tokens=9, block_size=1),
    Setup(windows=(None, 6), states=True, pages=9, rows=4, tokens=6),
    Setup(windows=(), states=True, rows=3, tokens=6),
    Setup(states=True, pages=12, rows=6, tokens=3),
    Setup(gangs=GANGS, pages=20, rows=8, tokens=16, context=40),
    Setup(gangs=GANGS, policy="priority", pages=12, rows=10, tokens=9, block_size=3, context=36),
    Setup(gangs=GANGS, windows=(None, None), pages=30, rows=6, tokens=4, block_size=1, context=40),
    Setup(method_states=True, pages=12, rows=6, tokens=5),
    Setup(drafting=True, pages=9, rows=4, tokens=9),
    Setup(drafting=True, policy="priority", pages=12, rows=6, tokens=12, block_size=3),
    Setup(drafting=True, windows=(None, 5), pages=9, rows=4, tokens=9, block_size=1),
    Setup(windows=(None, None, None), pages=9, rows=4, tokens=8, pruning=(HashedTokens(5, 0.4),)),
    Setup(
        policy="priority",
        windows=(None, None, None, None),
        pages=9,
        rows=3,
        tokens=6,
        block_size=3,
        pruning=(HashedTokens(4, 0.5),),
        method_states=True,
    ),
    Setup(
        windows=(None, None, None),
        pages=14,
        rows=4,
        tokens=14,
        context=30,
        policies=(PlainUnits(2, 1),),
        pruning=(HashedTokens(11, 0.6),),
    ),
    Setup(windows=(None, None), pages=12, rows=4, tokens=6, policies=(PlainUnits(3, 1),)),
    Setup(causal=False, pages=30, rows=4, tokens=24),
    Setup(causal=False, policy="priority", pages=12, rows=2),
)
POOLING: tuple[Pooling, ...] = ("last", "mean", "first")
ACTIONS = 1500

SITUATIONS = (
    "preemptions",
    "resumed",
    "overtakes",
    "prefix_hits",
    "evict",
    "copies",
    "blanks",
    "chunks",
    "mixed",
    "forks",
    "late_forks",
    "refused",
    "aborted",
    "failed",
    "dropped",
    "coded",
    "pruned",
    "pruned_coded",
    "compacted",
    "compacted_hits",
    "passed",
    "embedded",
    "seen_by_others",
    "kept",
    "unfit",
    "all_wrong",
    "all_right",
    "beside_others",
    "accepted",
)
"""Each must happen often. "mixed" steps feed chunks and single tokens together; "resumed" sequences
feed tokens again after a preemption; "late_forks" had lost the shared prompt by then. "kept" rows
are of members of gangs that had ended before a preemption; "unfit" gangs are refused. Guesses were
"all_wrong" or "all_right", and made "beside_others" that had none.
"""


class Walk:
    """Does something at random, again and again."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.harness = Harness(setup)
        self.random = random.Random(seed)
        self.texts = [self._tokens(self.harness.context) for _ in range(3)]
        scheduler = self.harness.engine.scheduler
        self.calls: Counter[str] = Counter()
        self._count_calls(scheduler.accounting.tree, "evict")
        self._count_calls(scheduler.policy, "overtakes")

    def _count_calls(self, owner: object, name: str) -> None:
        """Count the calls that return something true."""
        method = getattr(owner, name)

        def counted(*arguments: object) -> object:
            result = method(*arguments)
            self.calls[name] += bool(result)
            return result

        setattr(owner, name, counted)

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def add(self) -> None:
        rng, context = self.random, self.harness.context
        shared = rng.choice(self.texts)[: rng.randrange(context)]
        gangs = bool(self.harness.setup.gangs)
        if gangs:
            shared = shared[: context // 5]
        prompt = [*shared, *self._tokens(rng.randrange(4))][: context - 1] or [1]
        most = min(rng.choice((8, 10) if gangs else (0, 1, 4, 10, 18)), context - len(prompt))
        params = SamplingParams(
            n=rng.choice((1, 1, 2, 3, 4)),
            max_tokens=most,
            min_tokens=rng.randint(0, most) if rng.random() < 0.2 else 0,
            stop_token_ids=[rng.randrange(VOCAB)] if rng.random() < 0.2 else None,
            ignore_eos=rng.random() < (0.3 if gangs else 0.7),
            prompt_logprobs=0 if rng.random() < 0.25 else None,
        )
        profile = EXACT if rng.random() < 0.8 else Profile(adapter="adapter@1")
        if self.harness.setup.method_states and rng.random() < 0.5:
            profile = Profile(methods=(Watching(),))
        pooling: Pooling | None = None
        if not self.harness.setup.causal or rng.random() < 0.15:
            params = SamplingParams(max_tokens=0)
            pooling = rng.choice(POOLING)
        priority = rng.randint(-1, 1)
        policy = int(rng.random() < 0.7)
        gang = rng.choice((0, 1, 1, 2))
        begun = self._tokens(rng.randrange(3)) if gangs else []
        pruning = int(rng.random() < 0.7) if self.harness.setup.pruning else 0
        draft = Guessing(rng.choice((1, 3, 7)), rng.random() < 0.7) if rng.random() < 0.7 else None
        self.harness.add(
            prompt,
            params,
            priority=priority,
            profile=profile,
            policy=policy,
            gang=gang,
            pruning=pruning,
            begun=begun,
            pooling=pooling,
            draft=draft,
        )

    def act(self) -> None:
        rng, harness = self.random, self.harness
        chance = rng.random()
        if harness.setup.gangs and 0.3 < chance < 0.36:
            chance = 1.0  # few end before their time: some have to live on without their siblings
        if chance < 0.3:
            self.add()
        elif chance < 0.34 and harness.records:
            harness.abort(rng.choice(harness.unfinished or list(harness.records.values())))
        elif chance < 0.38 and len(harness.engine.scheduler.running):
            # Ctrl-C ends everything, so it is rare: pages have to run out in between.
            kind = rng.choice(("early", "submit", "collect", "rows", "rows", "rows"))
            harness.step(Fault("interrupt" if rng.random() < 0.1 else kind, rng.getrandbits(5)))
        else:
            harness.step()

    def run(self) -> Counter[str]:
        """Walk and drain; what happened, counted."""
        for _ in range(ACTIONS):
            self.act()
            self.harness.check()
        self.harness.drain()
        seen, stats = self.harness.runner.seen, self.harness.engine.stats()
        return Counter(
            preemptions=stats.preemptions,
            prefix_hits=stats.prefix_hit_tokens,
            aborted=stats.aborted,
            failed=stats.failed,
            refused=self.harness.refused,
            copies=seen.copies,
            blanks=seen.blanks,
            chunks=seen.chunks,
            mixed=seen.mixed,
            forks=seen.forks,
            late_forks=seen.late_forks,
            resumed=seen.resumed,
            dropped=seen.dropped,
            passed=seen.passed,
            coded=seen.coded,
            pruned=seen.pruned,
            pruned_coded=seen.pruned_coded,
            compacted=seen.compacted,
            compacted_hits=seen.compacted_hits,
            seen_by_others=seen.seen_by_others,
            kept=seen.kept,
            unfit=self.harness.unfit,
            all_wrong=seen.all_wrong,
            all_right=seen.all_right,
            beside_others=seen.beside_others,
            accepted=stats.accepted_tokens,
            embedded=sum(
                record.pooling is not None and record.reasons == ["length"]
                for record in self.harness.records.values()
            ),
            **self.calls,
            **{f"fault_{kind}": 1 for kind in seen.failed},
        )


def test_nothing_is_lost_whatever_happens() -> None:
    happened = Counter(dict.fromkeys(SITUATIONS, 0))
    for seed, setup in enumerate(SETUPS):
        happened.update(Walk(setup, seed).run())
    assert not {name: happened[name] for name in SITUATIONS if happened[name] < 20}
    assert {name for name in happened if name.startswith("fault_")} == {
        f"fault_{kind}" for kind in ("early", "submit", "collect", "interrupt", "rows")
    }


def test_walks_are_reproducible() -> None:
    assert Walk(SETUPS[0], seed=3).run() == Walk(SETUPS[0], seed=3).run()
