"""Many clients at once, on too little memory, some of whom leave: whoever stays gets, bit for bit,
what they would have got alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.contracts.step import PageTables, SampleState, StepPlan, Ticket
from headrace.engine.engine import Engine
from tests.llm.conftest import SMALL, MakeAsyncLLM, MakeLLM, check_idle

CLIENTS = 64
LEAVING = CLIENTS // 3
VOCAB = range(64, 4096)
PAGE_BYTES = 16 * 4096
Draw = tuple[tuple[int, ...], int]
"""The prompt of a client, which is like no other's, and the number of the token drawn."""


@dataclass
class Client:
    """``leaves_after`` so many tokens, or stays."""

    prompt: list[int]
    params: SamplingParams
    leaves_after: int | None = None


class Recorder:
    """Notes every draw's logits and every step's rows, by standing before sampler and runner."""

    def __init__(self, engine: Engine) -> None:
        self.logits: dict[Draw, bytes] = {}
        self.rows: list[int] = []
        self._sample = engine.runner.sampler.sample  # type: ignore[attr-defined]
        self._submit = engine.runner.submit
        engine.runner.sampler.sample = self.sample  # type: ignore[attr-defined]
        engine.runner.submit = self.submit  # type: ignore[method-assign]

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> Any:
        for row, state in zip(logits, states, strict=True):
            draw = (tuple(state.prompt_token_ids), len(state.output_token_ids))
            assert draw not in self.logits, "a token is drawn twice"
            self.logits[draw] = hashlib.blake2b(row.numpy().tobytes()).digest()
        return self._sample(logits, states)

    def submit(self, plan: StepPlan, tables: PageTables) -> Ticket:
        self.rows.append(len(plan.rows))
        return self._submit(plan, tables)

    def of(self, client: Client) -> list[bytes]:
        """Digests of the logits of a client's tokens, in order."""
        prompt = tuple(client.prompt)
        numbers = sorted(number for owner, number in self.logits if owner == prompt)
        return [self.logits[prompt, number] for number in numbers]


def make_clients(rng: random.Random) -> list[Client]:
    """Half of the prompts share one of three prefixes; half of the clients sample."""
    prefixes = [rng.choices(VOCAB, k=40) for _ in range(3)]
    clients = []
    for number in range(CLIENTS):
        prefix = rng.choice(prefixes) if number % 2 else []
        length = 64 + min(192, int(rng.expovariate(1 / 12))) if number else 256
        params = SamplingParams(
            max_tokens=length,
            temperature=0.0 if number % 4 < 2 else 1.0,
            top_p=0.95,
            seed=rng.getrandbits(32),
            ignore_eos=True,
        )
        clients.append(Client([*prefix, *rng.choices(VOCAB, k=rng.randint(4, 12))], params))
    for client in rng.sample(clients[1:], LEAVING):
        client.leaves_after = rng.randint(1, 60)
    return clients


def test_every_survivor_gets_what_it_would_get_alone(
    make_async_llm: MakeAsyncLLM, make_llm: MakeLLM
) -> None:
    rng = random.Random(2024)
    clients = make_clients(rng)
    llm = make_async_llm(
        kv_cache_memory_bytes=100 * PAGE_BYTES, max_num_seqs=32, max_num_batched_tokens=96
    )
    together = Recorder(llm.engine)
    tokens: dict[int, list[int]] = {}

    async def use(number: int, client: Client) -> None:
        async with aclosing(llm.generate(client.prompt, client.params)) as stream:
            async for output in stream:
                tokens[number] = output.outputs[0].token_ids
                if client.leaves_after is not None and len(tokens[number]) >= client.leaves_after:
                    return

    async def serve() -> None:
        await asyncio.gather(*(use(number, client) for number, client in enumerate(clients)))
        while llm.engine.has_unfinished_requests:
            await asyncio.sleep(0.005)

    asyncio.run(serve())
    check_idle(llm.engine)
    stats = llm.stats()
    assert max(together.rows) >= 16
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    assert stats.failed == 0

    survivors = [n for n, client in enumerate(clients) if client.leaves_after is None]
    assert len(survivors) == CLIENTS - LEAVING
    alone_llm: LLM = make_llm(enable_prefix_caching=False)
    alone = Recorder(alone_llm.engine)
    for number in survivors:
        client = clients[number]
        (result,) = alone_llm.generate(client.prompt, client.params)
        assert tokens[number] == result.outputs[0].token_ids
        assert len(tokens[number]) == client.params.max_tokens
        assert together.of(client) == alone.of(client)
        assert len(alone.of(client)) == client.params.max_tokens
    assert alone_llm.stats().preemptions == 0 and max(alone.rows) == 1
    assert SMALL["reference"], "only then results do not depend on the batch"
