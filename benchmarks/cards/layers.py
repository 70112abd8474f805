"""Methods by which tokens go through less of the layers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import progress
from safetensors.torch import save_file

from cards.measuring import (
    ON,
    Rows,
    Setup,
    Times,
    alone,
    estimated,
    fresh_prompts,
    greedy,
    in_turn,
    timed_rows,
    trained,
)
from cards.quality import Side, code_prompts, compare_tasks
from cards.replay import Leaving, leaving, leaving_as
from headrace import LLM, SamplingParams
from headrace.evaluation.measured import PLAIN, Measurement
from headrace.evaluation.statistics import mean_estimate
from headrace.evaluation.suite import make_task
from headrace.evaluation.task_run import TaskPlan
from headrace.exec.exits.early_exit import calibrate, fit_exit

EXIT = 4
"""Of the 8 layers of the trained model, those in front of the exit; as many of the large one's."""
AGREEMENT = 0.95
"""Of the tokens that leave, the share for which the exit is to say what the model says."""
CORE_CLAIM = "10.33x Hugging Face's and 2.72x PowerInfer's speed on a TITAN XP"
SLIM_CLAIM = "up to 2.53x to the first token, LLaMA3.1-8B on an RTX 4090"
KEEPS = (0.4, 0.7)


def generation_plans(setup: Setup) -> list[TaskPlan]:
    """Tasks that much is generated for."""
    count = setup.of(100, 4)
    code, sums = make_task("code-completion"), make_task("arithmetic")
    return [TaskPlan(code, "line", count), TaskPlan(sums, "2", count)]


def fit_heads(model: Path, prompts: Sequence[list[int]], tokens: int, path: Path) -> None:
    """Write the linear map in front of the exit, fitted to what the model itself makes of texts."""
    params = SamplingParams(max_tokens=tokens, seed=0, ignore_eos=True, detokenize=False)
    streams: dict[str, list[torch.Tensor]] = {}
    for site, layer in (("hidden", EXIT), ("final", None)):
        with LLM(str(model), methods=(f"activation-recorder:at={site}",)) as llm:
            recorder: Any = llm.methods.taps["activation-recorder"]
            llm.generate(list(prompts), params, use_tqdm=False)
            kept = recorder.take()
            streams[site] = kept[layer] if layer is not None else next(iter(kept.values()))
    found = fit_exit(torch.stack(streams["hidden"]), torch.stack(streams["final"]))
    save_file({f"{EXIT}.{name}": tensor for name, tensor in found.items()}, path)


def asked(side: Side, model: Path, prompts: Sequence[list[int]], tokens: int) -> Asked:
    """What the exit says of greedy texts of the model, none of whose tokens leaves."""
    sure, agrees = [], []
    with side.open(model) as llm:
        for ids in prompts:
            with leaving() as seen:
                [output] = llm.generate([ids], greedy(tokens), use_tqdm=False)
            # The first token comes from the prompt, all of which goes through all layers.
            said = output.outputs[0].token_ids[1:]
            sure += seen.sure
            agrees += [a == b for a, b in zip(seen.tokens, said, strict=True)]
    return torch.tensor(sure, dtype=torch.float64), torch.tensor(agrees)


Asked = tuple[torch.Tensor, torch.Tensor]
"""How sure a head was of tokens, and whether the model says the same."""


def exits(setup: Setup) -> Rows:
    """Exits of a trained model, and what they make of the large shape's time."""
    name, (model, label) = "early-exit", trained("base")
    count, context, tokens = setup.of((60, 256, 64), (3, 64, 16))
    with LLM(str(model)) as llm:
        prompts = code_prompts(llm, 3 * count, context)
    fitting, calibrating, testing = prompts[::3], prompts[1::3], prompts[2::3]
    with tempfile.TemporaryDirectory() as directory:
        heads = Path(directory) / "heads.safetensors"
        progress("  fitting the head")
        fit_heads(model, fitting, tokens, heads)
        options = f"{name}:layers={EXIT},heads={heads}"
        never = Side(f"{options},threshold=2")
        progress("  calibrating")
        threshold = calibrate(*asked(never, model, calibrating, tokens), AGREEMENT)
        threshold = min(2.0, threshold)
        sure, agrees = asked(never, model, testing, tokens)
        side = Side(f"{options},threshold={threshold:.4f}")
        with side.open(model) as llm, leaving() as trace:
            llm.generate(testing, greedy(tokens), use_tqdm=False)
        progress("  problems")
        rows = compare_tasks((model, label), [side], generation_plans(setup))[name]
    leaves = sure >= threshold
    shown = side.options.replace(str(heads), heads.name)
    about: dict[str, Any] = {"model": label, "options": shown}
    sample = f"{len(sure):,} tokens"
    rows = [replace(row, options=shown) for row in rows]
    share = mean_estimate(leaves.double().tolist())
    rows.append(estimated("tokens that leave half-way, share", share, sample, **about))
    if leaves.any():
        what = f"tokens that leave and are the model's, share ({AGREEMENT} was asked for)"
        same = mean_estimate(agrees[leaves].double().tolist())
        rows.append(
            estimated(
                what, same, f"{int(leaves.sum()):,} tokens", claim="accuracy is kept", **about
            )
        )
    return {name: [*rows, *exit_speed(setup, trace)]}


def exit_speed(setup: Setup, trace: Leaving) -> list[Measurement]:
    """Decoding on the large shape: where all leave, none, and as many as of the trained model."""
    model, label = setup.packed()
    name, half = "early-exit", setup.of(8, 2)
    options = f"{name}:layers={half}"
    length, tokens = setup.of((128, 64), (16, 12))
    rows: list[Measurement] = []
    with Side(options).open(model, **alone(1024)) as llm:
        prompts = fresh_prompts(llm, 1, length)
        sides: dict[str, Any] = {
            PLAIN: {},
            "all": {name: {"threshold": 0.0}},
            "none": {name: {"threshold": 2.0}},
        }
        found = in_turn(llm, setup, sides, prompts, greedy(tokens))
        for key, what, threshold in (
            ("all", "all leave", "0"),
            ("none", "none leaves", "2"),
        ):
            about = {"model": label, "options": f"{options},threshold={threshold}"}
            rows += timed_rows(found, about, label=key, what=f"decoding where {what}, tokens/s")
        with leaving_as(trace):
            found = in_turn(llm, setup, {PLAIN: {}, ON: None}, prompts, greedy(tokens))
    share = sum(trace.left) / max(1, len(trace.left))
    about = {
        "model": label,
        "options": options,
        "basis": f"rows leave as those of zoo/models/base do: {share:.0%}",
    }
    claim = "less computing time on some tasks"
    return [*rows, *timed_rows(found, about, claim=claim)]


def neurons(setup: Setup) -> Rows:
    """Scores with some of the neurons."""
    sides = [Side(f"core-infer:keep={keep}") for keep in KEEPS]
    return compare_tasks(trained("base"), sides, generation_plans(setup))


def neuron_speed(setup: Setup) -> Rows:
    """Decoding, prompts and memory of the large shape."""
    model, label = setup.checkpoint()
    name = "core-infer"
    length, tokens = setup.of((256, 32), (16, 8))
    options = alone(1024)
    with LLM(str(model), **options) as llm:
        plain_bytes = llm.model_info.weight_bytes
    with Side(name).open(model, **options) as llm:
        own_bytes = llm.model_info.weight_bytes
        sides: dict[str, Any] = {PLAIN: {}}
        sides |= {str(keep): {name: {"keep": keep}} for keep in KEEPS}
        prompts = fresh_prompts(llm, 1, length)
        found = in_turn(llm, setup, sides, prompts, greedy(tokens))
    rows: list[Measurement] = []
    for keep in KEEPS:
        about = {"model": label, "options": f"{name}:keep={keep}"}
        rows += timed_rows(found, about, label=str(keep), claim=CORE_CLAIM)
        what = f"prompt of {length} tokens, s"
        rows += timed_rows(found, about, label=str(keep), key="first", what=what)
    rows.append(
        Measurement(
            "weights in memory, GB",
            own_bytes / 1e9,
            "one engine",
            beside={PLAIN: plain_bytes / 1e9},
            model=label,
            options=name,
        )
    )
    return {name: rows}


def pruned(context: int) -> list[Side]:
    """Part by part, as by default, and all of a context at once, as in the paper."""
    return [Side("slim-infer"), Side(f"slim-infer:span={context}")]


def pruning(setup: Setup) -> Rows:
    """Scores where prompts are pruned."""
    context, count = setup.of((4096, 50), (256, 4))
    plans = [TaskPlan(make_task(name), str(context), count) for name in ("needle", "multi-key")]
    claim = "LongBench unharmed"
    # A part is fed in one step, beside a token of every other sequence.
    chunk = setup.of(context, 448) + 64
    sides = pruned(context)
    return compare_tasks(trained("long"), sides, plans, claim, max_num_batched_tokens=chunk)


def pruning_speed(setup: Setup) -> Rows:
    """The time to the first token of a long prompt, and what follows it, on the large shape."""
    model, label = setup.packed()
    context, tokens = setup.of((8192, 32), (512, 8))
    rows: list[Measurement] = []
    for side in pruned(context):
        progress(f"  {side.options}")
        options = alone(context + tokens, sequences=1)
        if side != pruned(context)[0]:
            options["max_num_batched_tokens"] = context + 64
        with side.open(model, **options) as llm:
            prompts = fresh_prompts(llm, 1, context)
            short = Setup(min(3, setup.rounds), setup.quick)
            found = in_turn(llm, short, {PLAIN: {}, ON: None}, prompts, greedy(tokens))
        rows += _pruning_rows(found, {"model": label, "options": side.options}, context, tokens)
    return {"slim-infer": rows}


def _pruning_rows(
    found: dict[str, list[Times]], about: dict[str, Any], context: int, tokens: int
) -> list[Measurement]:
    what = f"prompt of {context} tokens, s"
    rows = timed_rows(found, about, key="first", what=what, claim=SLIM_CLAIM)
    rows += timed_rows(found, about, what=f"decoding at {context} tokens, tokens/s")
    ends = {key: [each.first + tokens / each.rate for each in own] for key, own in found.items()}
    ratios = [a / b for a, b in zip(ends[PLAIN], ends[ON], strict=True)]
    rows.append(
        Measurement(
            f"prompt of {context} tokens and {tokens} more: speed, plain = 1",
            median(ratios),
            f"{len(ratios)} rounds",
            low=min(ratios),
            high=max(ratios),
            beside={PLAIN: 1.0},
            claim="up to 1.88x from beginning to end",
            **about,
        )
    )
    return rows
