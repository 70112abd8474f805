"""The engine on a virtual clock: predicted durations in place of forward passes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout, attention_layout
from headrace.contracts.outputs import RequestMetrics, TokenLogprobs
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.step import (
    PageTables,
    RowResult,
    Runner,
    StepPlan,
    StepResult,
    Ticket,
)
from headrace.engine.clock import VirtualClock
from headrace.engine.compose import compose_engine, fit_context
from headrace.engine.engine import Engine, EngineLimits
from headrace.errors import OverloadedError


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a step: the larger of reading the weights and computing on the inputs, plus
    reading the KV of every row, plus a constant.

    The defaults are of the order of a 1.2 B model in bf16 on two cores.
    """

    step: float = 0.002
    weights: float = 0.105
    per_input: float = 0.0015
    per_slot: float = 1.4e-6

    def seconds(self, plan: StepPlan) -> float:
        """Predicted duration of a plan."""
        slots = sum(row.slot - row.begin + len(row.input_ids) for row in plan.rows)
        slots += sum(segment.length for row in plan.rows for segment in row.segments)
        work = max(self.weights, plan.num_inputs * self.per_input)
        return self.step + work + slots * self.per_slot


class SimRunner(Runner):
    """Answers plans with sampled tokens after a predicted time; ``collect`` moves the clock.

    Args:
        clock: the engine's clock.
        cost: predicts durations.
        draw_token: the next token of a row; ends of sequences are drawn here too.
    """

    def __init__(
        self, clock: VirtualClock, cost: LinearCost, draw_token: Callable[[], int]
    ) -> None:
        self._clock = clock
        self._cost = cost
        self._draw = draw_token
        self._plans: dict[Ticket, tuple[StepPlan, float]] = {}
        self._tickets = 0

    def submit(self, plan: StepPlan, tables: PageTables) -> Ticket:
        self._tickets += 1
        ticket = Ticket(self._tickets)
        self._plans[ticket] = (plan, self._clock.now() + self._cost.seconds(plan))
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        plan, done = self._plans.pop(ticket)
        self._clock.advance_to(done)
        rows = [
            RowResult(
                [self._draw() for _ in row.samples],
                [None] * len(row.samples),
                [TokenLogprobs(token, 0.0, 1, ()) for token in row.score_ids],
            )
            for row in plan.rows
        ]
        return StepResult(rows)


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request of a workload; ``arrival`` in seconds of virtual time."""

    arrival: float
    prompt_token_ids: list[int]
    max_tokens: int
    priority: int = 0


@dataclass(slots=True)
class SimulationReport:
    """What became of a workload. Times are seconds of virtual time."""

    metrics: list[RequestMetrics] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    refused: int = 0
    duration: float = 0.0
    steps: int = 0
    preemptions: int = 0
    prefix_hit_rate: float = 0.0


def poisson_workload(
    *,
    requests: int,
    rate: float,
    mean_input: int,
    mean_output: int,
    shared_prefixes: int,
    prefix_length: int,
    vocab_size: int,
    seed: int,
) -> list[SimulatedRequest]:
    """Poisson arrivals of ``rate`` per second; lengths are exponential around their means.

    Half of the requests begin with one of ``shared_prefixes`` prefixes; the mean input counts it.
    """
    rng = random.Random(seed)
    prefixes = [
        [rng.randrange(vocab_size) for _ in range(prefix_length)] for _ in range(shared_prefixes)
    ]
    workload, now = [], 0.0
    for _ in range(requests):
        now += rng.expovariate(rate)
        prefix = rng.choice(prefixes) if prefixes and rng.random() < 0.5 else []
        own = max(1, round(rng.expovariate(1 / max(1, mean_input - len(prefix)))))
        prompt = prefix + [rng.randrange(vocab_size) for _ in range(own)]
        workload.append(
            SimulatedRequest(now, prompt, max(1, round(rng.expovariate(1 / mean_output))))
        )
    return workload


def simulated_engine(
    config: EngineConfig,
    *,
    layout: CacheLayout | None = None,
    num_pages: int,
    context: int,
    vocab_size: int = 32_000,
    cost: LinearCost | None = None,
    draw_token: Callable[[], int] | None = None,
    eos_token_ids: tuple[int, ...] = (),
    causal: bool = True,
) -> tuple[Engine, VirtualClock]:
    """The composition that ``LLM`` uses, around a ``SimRunner`` on a virtual clock."""
    layout = layout or attention_layout(
        layers=1, kv_heads=1, head_dim=64, dtype="bfloat16", block_size=config.block_size
    )
    clock = VirtualClock()
    rng = random.Random(config.seed)
    runner = SimRunner(
        clock, cost or LinearCost(), draw_token or (lambda: rng.randrange(vocab_size))
    )
    chunk = config.max_num_batched_tokens or 512
    limits = EngineLimits(
        max_model_len=fit_context(config, layout, num_pages, context, chunk),
        max_num_waiting=config.max_num_waiting,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        generates=causal,
    )
    engine = compose_engine(
        config,
        layout=layout,
        num_pages=num_pages,
        max_num_batched_tokens=chunk,
        limits=limits,
        runner=runner,
        clock=clock,
        causal=causal,
    )
    return engine, clock


def simulate(
    engine: Engine, clock: VirtualClock, workload: Iterable[SimulatedRequest]
) -> SimulationReport:
    """Run a workload, in order of arrival, to its end."""
    pending = deque(workload)
    report = SimulationReport()
    lengths: dict[str, int] = {}
    number = 0
    while pending or engine.has_unfinished_requests:
        if not engine.has_unfinished_requests:
            clock.advance_to(pending[0].arrival)
        while pending and pending[0].arrival <= clock.now():
            request = pending.popleft()
            params = SamplingParams(max_tokens=request.max_tokens)
            try:
                engine.add_request(
                    str(number), request.prompt_token_ids, params, priority=request.priority
                )
            except OverloadedError:
                report.refused += 1
            number += 1
        for update in engine.step():
            lengths[update.request_id] = lengths.get(update.request_id, 0) + len(update.token_ids)
            if update.metrics is not None:
                report.metrics.append(update.metrics)
                report.output_tokens.append(lengths.pop(update.request_id))
    stats = engine.stats()
    report.duration = clock.now()
    report.steps = stats.steps
    report.preemptions = stats.preemptions
    report.prefix_hit_rate = stats.prefix_hit_tokens / max(1, stats.prefix_query_tokens)
    return report
