"""Methods that guess tokens: what is accepted, and what that makes of the time of a long context.

Acceptance is that of trained models on the contexts that these have, with everything that is a
share of the context scaled to it. Time is that of the large shape, where as much is accepted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import progress
from make_checkpoint import ensure_packed

from cards.measuring import (
    ON,
    Rows,
    Setup,
    estimated,
    greedy,
    in_turn,
    timed_rows,
    trained,
)
from cards.quality import Side, code_prompts, open_plain
from cards.replay import Acceptances, acceptances_of, accepting
from headrace.cli.bench.engine import random_prompts
from headrace.evaluation.measured import PLAIN, Measurement
from headrace.evaluation.statistics import mean_estimate
from headrace.loading import embedded_model

CLAIMS = {
    "draft-model": "2 to 3x on T5-XXL, by TPUs",
    "triforce": "up to 2.31x, Llama2-7B-128K on an A100",
}


def draft() -> tuple[Path, str]:
    """The small model of the zoo; the embedded one where that is not there."""
    path, name = trained("draft")
    return (path, name) if path.exists() else (embedded_model(), "the embedded model")


def methods(small: Path, scale: int) -> list[Side]:
    """Both, for contexts that are a ``scale``-th of the longest."""
    model = f"model={small},adaptive=false"
    window, budget = (max(64, tokens // scale) for tokens in (1024, 4096))
    return [
        Side(f"draft-model:{model},window={window},length=4"),
        Side(f"triforce:{model},window={max(64, 256 // scale)},budget={budget}"),
    ]


def named(side: Side, small: Path) -> str:
    """The options of a method without where files are."""
    return side.options.replace(str(small), small.name)


def accepted(setup: Setup) -> dict[str, tuple[Acceptances, Rows]]:
    """What trained models accept, by method."""
    model, label = trained("base")
    small, small_label = draft()
    count, context, tokens = setup.of((24, 1536, 64), (2, 192, 16))
    found: dict[str, tuple[Acceptances, Rows]] = {}
    # 32k of the large shape are 1.5k here.
    for side in methods(small, 21):
        progress(f"  {side.options}")
        # Prompts come first in a step's budget; with few at a time, there is room for guesses.
        with acceptances_of(side.name) as counts, side.open(model, max_num_seqs=4) as llm:
            prompts = code_prompts(llm, count, context)
            drafted = llm.generate(prompts, greedy(tokens), use_tqdm=False)
        shares = []
        for output in drafted:
            metrics = output.metrics
            assert metrics is not None
            shares.append(metrics.num_accepted_tokens / max(1, metrics.num_draft_tokens))
        about: dict[str, Any] = {
            "model": f"{label}, guessed for by {small_label}",
            "options": named(side, small),
        }
        sample = f"{len(prompts)} texts of {context} tokens, {tokens} more each"
        length = "tokens of a step, guesses and the model's own"
        rows = [
            estimated("guesses that stay, share", mean_estimate(shares), sample, **about),
            Measurement(length, counts.length(0), sample, beside={PLAIN: 1.0}, **about),
        ]
        if (1, 2) in counts.counts:
            what = "guesses of the small model that stay on few pages, share"
            rows.append(Measurement(what, counts.share(1), sample, **about))
        found[side.name] = counts, {side.name: rows}
    return found


def acceptance(setup: Setup) -> Rows:
    """What trained models accept, and whether the tokens are the plain engine's."""
    rows: Rows = {}
    for _, more in accepted(setup).values():
        rows |= more
    for name, row in same_tokens(setup).items():
        rows[name].append(row)
    return rows


def same_tokens(setup: Setup) -> dict[str, Measurement]:
    """Greedy tokens in fp32, in which little rounds otherwise; by method."""
    (model, label), (small, small_label) = trained("base"), draft()
    count, context, tokens = setup.of((8, 96, 64), (1, 32, 8))
    generated: dict[str, list[int]] = {}
    sides = methods(small, 64)
    for key, side in ((PLAIN, None), *((side.name, side) for side in sides)):
        progress(f"  fp32: {key}")
        opened = side.open if side else open_plain
        with opened(model, dtype="float32") as llm:
            outputs = llm.generate(
                code_prompts(llm, count, context), greedy(tokens), use_tqdm=False
            )
        generated[key] = [token for output in outputs for token in output.outputs[0].token_ids]
    rows = {}
    for side in sides:
        pairs = zip(generated[PLAIN], generated[side.name], strict=True)
        rows[side.name] = estimated(
            "greedy tokens that are the plain engine's, share",
            mean_estimate([float(one == other) for one, other in pairs]),
            f"{len(generated[PLAIN])} tokens",
            beside={PLAIN: 1.0},
            model=f"{label}, guessed for by {small_label}, fp32",
            options=named(side, small),
        )
    return rows


def long_context(setup: Setup) -> Rows:
    """Decoding behind a long prompt, with the acceptance of trained models."""
    recorded = accepted(setup)
    model, label = setup.packed()
    small = ensure_packed(setup.of("llama-draft", "tiny-draft"), "w4a8")
    context, tokens = setup.of((32_768, 64), (1024, 24))
    found = {}
    for side in methods(small, setup.of(1, 32)):
        progress(f"  {side.options}")
        options = {"max_model_len": context + tokens + 64, "max_num_seqs": 2}
        counts, _ = recorded[side.name]
        with side.open(model, **options) as llm, accepting(side.name, counts):
            [prompt] = random_prompts(1, context, 4000)
            # All share its pages.
            llm.generate([prompt], greedy(1), methods={})
            short = greedy(tokens)

            def ends(number: int, prompt: list[int] = prompt) -> list[list[int]]:
                return [[*prompt, *random_prompts(1, 8, 4000, seed=number)[0]]]

            found[side.name] = side, in_turn(llm, setup, {PLAIN: {}, ON: None}, ends, short)
    rows: Rows = {}
    trained_label, small_label = trained("base")[1], draft()[1]
    for name, (side, times) in found.items():
        about = {
            "model": f"{label}; guessed for by {small.name}, random weights",
            "options": named(side, small),
            "basis": f"acceptance replayed from {trained_label} with {small_label}",
        }
        what = f"decoding at {context} tokens, tokens/s"
        rows[name] = timed_rows(times, about, what=what, claim=CLAIMS[name])
    _set_beside(rows)
    return rows


def _set_beside(rows: Rows) -> None:
    """Show what one level of guessing gives, beside two."""
    one, two = rows["draft-model"], rows["triforce"]
    for number, row in enumerate(two):
        values = {**(row.beside or {}), "a small model alone": one[number].value}
        two[number] = replace(row, beside=values)
