"""Methods that see or change activations.

The behaviour that is steered for, the number of heads and the strengths were chosen on the half of
the files that directions are fitted to; what is measured comes from the other half.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import progress
from safetensors.torch import save_file

from cards.measuring import (
    ON,
    Rows,
    Setup,
    alone,
    estimated,
    fresh_prompts,
    greedy,
    in_turn,
    timed_rows,
    trained,
)
from cards.quality import Side, code_prompts, compare_tasks, open_plain
from headrace import LLM, SamplingParams
from headrace.evaluation.held_out import held_out_texts
from headrace.evaluation.measured import PLAIN, Measurement
from headrace.evaluation.statistics import mean_estimate, paired_difference
from headrace.evaluation.suite import make_task
from headrace.evaluation.task_run import TaskPlan
from headrace.exec.steering.inference_time_intervention import fit_direction
from headrace.methods import Choice

CONTEXT = 192
"""Tokens before a line."""
HEADS = 12
"""That are moved, of the 32 of the model."""
STRENGTHS = (2.0, 4.0)
CLAIM = "TruthfulQA, Alpaca: 32.5 % to 65.1 % truthful"
ITI = "inference-time-intervention"
BEHAVIOUR = "if"
"""The behaviour is to begin the next line with this word."""


def beginnings(llm: LLM, count: int, files: slice, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Contexts that end with a line's end, and whether the next line shows the behaviour.

    As many of the one kind as of the other.
    """
    texts = list(held_out_texts().values())[files]
    places: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for text in texts:
        offset = 0
        for line in text.splitlines(keepends=True):
            if offset > 1000 and line.strip():
                places[line.strip().startswith(BEHAVIOUR)].append((text, offset))
            offset += len(line)
    source = random.Random(seed)
    for shown, found in places.items():
        for text, offset in source.sample(found, min(count // 2, len(found))):
            yield llm.tokenizer.encode(text[:offset])[-CONTEXT:], shown


def find_direction(model: Path, setup: Setup) -> torch.Tensor:
    """From what attention heads say at the ends of contexts of half of the files."""
    outputs, labels = [], []
    with open_plain(model, methods=("activation-recorder",)) as llm:
        recorder: Any = llm.methods.taps["activation-recorder"]
        for ids, shown in beginnings(llm, setup.of(800, 24), slice(0, None, 2), 0):
            llm.generate([ids], greedy(1), use_tqdm=False)
            kept = recorder.take()
            outputs.append(torch.stack([kept[layer][0] for layer in sorted(kept)]))
            labels.append(shown)
    return fit_direction(torch.stack(outputs), torch.tensor(labels), HEADS)


def intervention(setup: Setup) -> Rows:
    """How often the next line begins as steered for, and what that costs tasks."""
    model, label = trained("base")
    progress("  fitting the direction")
    with tempfile.TemporaryDirectory() as directory:
        vectors = Path(directory) / "directions.safetensors"
        save_file({"behaviour": find_direction(model, setup)}, vectors)
        sides = [Side(f"{ITI}:vectors={vectors},strength={each}") for each in STRENGTHS]
        rows = _behaviour(setup, sides, vectors, (model, label))
        plan = TaskPlan(make_task("code-completion"), "line", setup.of(100, 4))
        tasks = compare_tasks((model, label), sides[:1], [plan])
    rows[ITI] += tasks[ITI]
    return {ITI: [_without(row, vectors) for row in rows[ITI]]}


def _behaviour(setup: Setup, sides: list[Side], vectors: Path, model: tuple[Path, str]) -> Rows:
    """On contexts of the other half of the files, of which half show it."""
    count, samples = setup.of((200, 4), (8, 2))
    params = [
        SamplingParams(n=samples, max_tokens=8, seed=number, ignore_eos=True)
        for number in range(count)
    ]
    shares: dict[str, list[float]] = {}
    with sides[0].open(model[0]) as llm:
        contexts = [ids for ids, _ in beginnings(llm, count, slice(1, None, 2), 1)]
        opposite = {"strength": -STRENGTHS[0]}
        choices: dict[str, Any] = {PLAIN: {}, "the other way": {ITI: opposite}}
        choices |= {
            each.options: {ITI: {"strength": s}} for each, s in zip(sides, STRENGTHS, strict=True)
        }
        for key, choice in choices.items():
            progress(f"  behaviour: {key}")
            outputs = llm.generate(
                contexts, params[: len(contexts)], methods=choice, use_tqdm=False
            )
            shares[key] = [
                sum(each.text.strip().startswith(BEHAVIOUR) for each in output.outputs) / samples
                for output in outputs
            ]
    values = {key: mean_estimate(found).mean for key, found in shares.items()}
    rows = [
        estimated(
            f'lines that begin with "{BEHAVIOUR}", share',
            mean_estimate(shares[side.options]),
            f"{len(contexts)} contexts, {samples} draws each",
            beside={key: values[key] for key in (PLAIN, "the other way")},
            p_value=paired_difference(shares[PLAIN], shares[side.options]).p_value,
            claim=CLAIM,
            model=model[1],
            options=side.options,
        )
        for side in sides
    ]
    return {ITI: rows}


def _without(row: Measurement, path: Path) -> Measurement:
    return replace(row, options=row.options.replace(str(path), path.name))


def speed(setup: Setup) -> Rows:
    """Decoding on the large shape, with all heads of half of the layers moved, or kept."""
    model, label = setup.packed()
    length, tokens = setup.of((128, 64), (16, 8))
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as directory:
        vectors = Path(directory) / "directions.safetensors"
        layers, heads, width = setup.of((16, 32, 64), (4, 8, 32))
        direction = torch.zeros(layers, heads, width)
        direction[::2] = 0.01
        save_file({"any": direction}, vectors)
        for side in (Side(f"{ITI}:vectors={vectors}"), Side("activation-recorder")):
            progress(f"  {side.options}")
            with side.open(model, **alone(1024)) as llm:
                prompts = fresh_prompts(llm, 1, length)
                found = in_turn(llm, setup, {PLAIN: {}, ON: None}, prompts, greedy(tokens))
            about = {"model": label, "options": side.options}
            rows[side.name] = [_without(row, vectors) for row in timed_rows(found, about)]
    return rows


def recording(setup: Setup) -> Rows:
    """Whether what is recorded from generates the same."""
    model, label = trained("base")
    side = Side("activation-recorder")
    count, tokens = setup.of((20, 64), (1, 8))
    choices: tuple[Choice | None, ...] = ({}, None)
    with side.open(model, dtype="float32") as llm:
        contexts = code_prompts(llm, count, 64)
        pair = [
            llm.generate(contexts, greedy(tokens), methods=choice, use_tqdm=False)
            for choice in choices
        ]
    same = [
        float(a == b)
        for one, other in zip(*pair, strict=True)
        for a, b in zip(one.outputs[0].token_ids, other.outputs[0].token_ids, strict=True)
    ]
    row = estimated(
        "greedy tokens that are the plain engine's, share",
        mean_estimate(same),
        f"{len(same):,} tokens",
        beside={PLAIN: 1.0},
        model=f"{label}, fp32",
        options=side.options,
    )
    return {side.name: [row]}
