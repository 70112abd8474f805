"""Methods that decide what stays in the KV cache, or in how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import progress

from cards.measuring import (
    ON,
    Rows,
    Setup,
    alone,
    fresh_prompts,
    greedy,
    in_turn,
    timed_rows,
    trained,
    watched,
)
from cards.quality import Side, compare_tasks, compare_text
from headrace import LLM
from headrace.cli.bench.engine import random_prompts
from headrace.evaluation.measured import PLAIN, Measurement
from headrace.evaluation.suite import make_task
from headrace.evaluation.task_run import TaskPlan
from headrace.methods import Choice

SHARE = 0.2
"""Of the context that stays."""
CLAIMS = {
    "scissorhands": "5x less memory of the KV cache, without loss of quality",
    "h2o": "5x less memory of the KV cache with 20 % of it, without loss of accuracy",
    "gear": "4 bits, near-lossless; 2.29x less memory at the peak",
    "kivi": "2 bits, 2.6x less memory at the peak, weights included",
}
SPEED_CLAIMS = {
    "h2o": "up to 29x the throughput of three other systems, on a T4",
    "gear": "2.38x the throughput, by larger batches",
    "kivi": "2.35 to 3.47x the throughput, by larger batches",
}
CODECS = ("gear:bits=4", "gear:bits=2", "kivi:bits=4", "kivi:bits=2")


def policies(context: int) -> list[Side]:
    """All that keep ``SHARE`` of a context."""
    budget = int(context * SHARE) // 16 * 16
    history = min(64, budget // 8)
    return [
        Side(f"scissorhands:budget={budget},drop=0.2,history={history},recent={budget // 8}"),
        Side(f"h2o:budget={budget},drop=0.2"),
        Side(f"random-eviction:keep={SHARE}"),
    ]


def held_pages(side: Side, llm: LLM, prompt: list[int], tokens: int) -> tuple[int, int]:
    """Most pages while a request generates: with the method, and without."""
    counts = []
    choices: tuple[Choice | None, ...] = (None, {})
    for choice in choices:
        steps = watched(llm, [prompt], greedy(tokens), choice)
        counts.append(max(stats.pages_used for stats, generating in steps if generating))
    return counts[0], counts[1]


def pages(setup: Setup) -> Rows:
    """What is left of the pages of one sequence."""
    model, label = trained("long")
    context, tokens = setup.of((8192, 400), (512, 60))
    rows: Rows = {}
    for side in policies(context):
        progress(f"  {side.options}")
        with side.open(model, enable_prefix_caching=False) as llm:
            [prompt] = random_prompts(1, context, llm.model_info.vocab_size)
            own, plain = held_pages(side, llm, prompt, tokens)
        row = Measurement(
            f"pages held at {context} tokens, at most, of the plain engine's",
            own / plain,
            f"{tokens} tokens generated",
            beside={PLAIN: 1.0},
            claim=CLAIMS.get(side.name, ""),
            model=label,
            options=side.options,
        )
        rows[side.name] = [row]
    return rows


def sequences(setup: Setup) -> Rows:
    """How many generate at once in the memory of a few plain ones."""
    model, label = trained("long")
    context, tokens, plain, requests = setup.of((2048, 256, 4, 32), (256, 32, 2, 8))
    rows: Rows = {}
    for side in policies(context):
        progress(f"  {side.options}")
        with side.open(model) as llm:
            memory = (context + tokens) * llm.model_info.kv_token_bytes * plain
        options: dict[str, Any] = {
            "kv_cache_memory_bytes": memory,
            "enable_prefix_caching": False,
            "max_model_len": context + tokens,
        }
        most = {}
        with side.open(model, **options) as llm:
            prompts = random_prompts(requests, context, llm.model_info.vocab_size)
            for name, choice in ((PLAIN, {}), (ON, None)):
                before = llm.stats().preemptions
                steps = watched(llm, prompts, greedy(tokens), choice)
                most[name] = max(generating for _, generating in steps)
                progress(f"  {name}: {most[name]}, {llm.stats().preemptions - before} preempted")
        row = Measurement(
            f"sequences of {context} tokens that generate at once in the same memory",
            float(most[ON]),
            f"{requests} requests",
            beside={PLAIN: float(most[PLAIN])},
            claim=CLAIMS.get(side.name, ""),
            model=label,
            options=side.options,
        )
        rows[side.name] = [row]
    return rows


def recall_plans(setup: Setup) -> list[TaskPlan]:
    """Recall from a context, with the question known while it is read, or not yet."""
    level, count = setup.of(("2048", 50), ("256", 4))
    needle, several = make_task("needle"), make_task("multi-key")
    return [
        TaskPlan(needle, level, count),
        TaskPlan(needle, level, count, agnostic=True),
        TaskPlan(several, level, count, agnostic=True),
    ]


def policy_recall(setup: Setup) -> Rows:
    """Scores of all policies beside each other."""
    sides = policies(setup.of(2048, 256))
    return compare_tasks(trained("long"), sides, recall_plans(setup))


def policy_text(setup: Setup) -> Rows:
    """Perplexity of all policies beside each other."""
    window, tokens = setup.of((2048, 16_384), (512, 512))
    # The mean context of the tokens that count.
    return compare_text(trained("base"), policies(window * 3 // 4), window, tokens)


def codec_recall(setup: Setup) -> Rows:
    """Scores of all codecs."""
    sides = [Side(options) for options in CODECS]
    return compare_tasks(trained("long"), sides, recall_plans(setup)[:2])


def codec_text(setup: Setup) -> Rows:
    """Perplexity of all codecs."""
    window, tokens = setup.of((2048, 16_384), (512, 512))
    return compare_text(trained("base"), [Side(options) for options in CODECS], window, tokens)


def codec_bytes(setup: Setup) -> Rows:
    """Bytes that a token takes, what is not coded yet included."""
    model, label = setup.packed()
    context = setup.of(4096, 512)
    rows: Rows = {}
    for options in CODECS:
        side = Side(options)
        with side.open(model, **alone(context + 32)) as llm:
            info = llm.model_info
            [prompt] = random_prompts(1, context, 4000)
            own, plain = held_pages(side, llm, prompt, 16)
        page = info.page_bytes
        row = Measurement(
            f"bytes of a token in the KV cache, at {context} tokens",
            own * page / context,
            "one sequence",
            beside={PLAIN: plain * page / context},
            claim=CLAIMS[side.name],
            model=label,
            options=options,
        )
        rows.setdefault(side.name, []).append(row)
    return rows


def speed(setup: Setup, sides: Sequence[Side], context: int, tokens: int) -> Rows:
    """Prompts and decoding on the large shape."""
    model, label = setup.packed()
    rows: Rows = {}
    for side in sides:
        progress(f"  {side.options}")
        with side.open(model, **alone(context + tokens)) as llm:
            prompts = fresh_prompts(llm, 1, context)
            short = Setup(min(3, setup.rounds), setup.quick)
            found = in_turn(llm, short, {PLAIN: {}, ON: None}, prompts, greedy(tokens))
        about = {"model": label, "options": side.options}
        claim = SPEED_CLAIMS.get(side.name, "")
        rows[side.name] = [
            *timed_rows(found, about, claim=claim, what=f"decoding at {context} tokens, tokens/s"),
            *timed_rows(found, about, key="first", what=f"prompt of {context} tokens, s"),
        ]
    return rows


def policy_speed(setup: Setup) -> Rows:
    """Of the policies that choose."""
    context, tokens = setup.of((8192, 48), (512, 16))
    return speed(setup, policies(context)[:2], context, tokens)


def codec_speed(setup: Setup) -> Rows:
    """Of the codecs as they are by default."""
    context, tokens = setup.of((4096, 16), (512, 16))
    return speed(setup, [Side("gear:bits=4"), Side("kivi:bits=2")], context, tokens)
